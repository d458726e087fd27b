#include "runtime/cpu_runtime.h"

namespace jaxmoe {
namespace {

// Far beyond any machine; keeps a mistyped number from starting a million threads.
constexpr int kMaxThreads = 1024;

}  // namespace

Status CpuRuntime::create(const RuntimeOptions& options, std::shared_ptr<CpuRuntime>* runtime) {
  std::shared_ptr<CpuRuntime> result(new CpuRuntime());
  std::vector<int> allowed = allowed_cpus();
  int threads = options.num_threads;
  if (options.fake_nodes) {
    Status status = fake_topology(*options.fake_nodes, allowed, &result->topology_);
    if (!status.ok()) return status;
    if (threads == 0) threads = result->topology_.num_cpus();
  } else {
    result->topology_ = discover_topology(allowed);
    if (threads == 0) threads = result->topology_.default_threads();
  }
  if (result->num_nodes() > kMaxNodes) {
    return Status::error("this machine has " + std::to_string(result->num_nodes()) +
                         " NUMA nodes; at most " + std::to_string(kMaxNodes) +
                         " are supported: restrict the process's CPUs (taskset, numactl)");
  }
  if (threads < 1 || threads > kMaxThreads) {
    return Status::error("num_threads is " + std::to_string(threads) + "; wanted 1 to " +
                         std::to_string(kMaxThreads));
  }
  result->isa_ = options.isa.value_or(best_isa());
  result->isa_forced_ = options.isa.has_value();
  if (!isa_supported(result->isa_)) {
    return Status::error(std::string("isa \"") + isa_name(result->isa_) +
                         "\" is not supported by this CPU; the best it has is \"" +
                         isa_name(best_isa()) + "\"");
  }
  result->table_ = kernel_table(result->isa_);
  result->pool_ = std::make_unique<Pool>(result->topology_,
                                         place_threads(result->topology_, threads), result->isa_);
  *runtime = std::move(result);
  return {};
}

const MatmulKernel& CpuRuntime::kernel(Family family, WeightFormat format,
                                       ActivationType type) const {
  return select_kernel(table_, family, format, type);
}

std::string CpuRuntime::describe() const {
  std::string text = std::to_string(num_threads()) + (num_threads() == 1 ? " thread" : " threads") +
                     " on " + topology_.describe() + "; ISA " + isa_name(isa_) + " (" +
                     (isa_forced_ ? std::string("forced by the caller; ") : std::string()) +
                     isa_reason() + ")";
  if (int failed = pool_->num_failed_pins()) {
    text += "; " + std::to_string(failed) + " threads could not be pinned to their CPUs";
  }
  return text;
}

}  // namespace jaxmoe

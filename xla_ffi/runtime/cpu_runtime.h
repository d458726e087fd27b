// CpuRuntime: topology, thread pool and instruction set, decided once and passed down.
#ifndef JAXMOE_RUNTIME_CPU_RUNTIME_H_
#define JAXMOE_RUNTIME_CPU_RUNTIME_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/pool.h"
#include "runtime/status.h"
#include "runtime/topology.h"

namespace jaxmoe {

struct RuntimeOptions {
  int num_threads = 0;  // 0: Topology::default_threads(), or every CPU of a fake topology
  std::optional<std::vector<std::vector<int>>> fake_nodes;
  std::optional<Isa> isa;  // unset: best_isa()
};

// Totals since creation.
struct RuntimeStats {
  std::atomic<uint64_t> experts_calls{0};
  std::atomic<uint64_t> experts_distinct{0};      // sum over calls of distinct experts read
  std::atomic<uint64_t> experts_weight_bytes{0};  // bytes of those experts, scales included
  std::atomic<uint64_t> linear_calls{0};
  std::atomic<uint64_t> linear_weight_bytes{0};
  std::atomic<uint64_t> attention_calls{0};
  std::atomic<uint64_t> attention_kv_bytes{0};
  // Arithmetic that was asked for; a multiply-add counts as two.
  std::atomic<uint64_t> experts_flops{0};
  std::atomic<uint64_t> linear_flops{0};
  std::atomic<uint64_t> attention_flops{0};
};

class CpuRuntime {
 public:
  static Status create(const RuntimeOptions& options, std::shared_ptr<CpuRuntime>* runtime);

  int num_threads() const { return pool_->num_participants(); }
  int num_nodes() const { return static_cast<int>(topology_.nodes.size()); }
  Isa isa() const { return isa_; }
  const Topology& topology() const { return topology_; }
  Pool& pool() { return *pool_; }
  Tracer& tracer() { return pool_->tracer(); }
  RuntimeStats& stats() { return stats_; }
  // Activation rows of one matrix up to which a unit's time is that of its weight bytes: units are
  // then long runs of memory, beyond they are what a second-level cache holds. Which it is decides
  // who computes what when, never in which order anything is added, so it may be chosen by
  // measurement (and only such things may).
  int64_t few_tokens() const { return few_tokens_.load(std::memory_order_relaxed); }
  void set_few_tokens(int64_t tokens) { few_tokens_.store(tokens, std::memory_order_relaxed); }
  std::string describe() const;

  // The table's kernel. F32 activations always take the kVector form: kMatrix rounds them to BF16.
  const MatmulKernel& kernel(Family family, WeightFormat format, ActivationType type) const;
  // For tests of what other instruction sets' kernels ask of their callers. Not while operations
  // run.
  void replace_kernel_for_tests(Family family, WeightFormat format, const MatmulKernel& kernel) {
    for (ActivationType type : {ActivationType::kF32, ActivationType::kBf16}) {
      if (type == ActivationType::kF32 && family != Family::kVector) continue;
      table_.matmul[static_cast<int>(select_family(family, type))][static_cast<int>(format)] =
          kernel;
    }
  }

 private:
  CpuRuntime() = default;

  Topology topology_;
  Isa isa_ = Isa::kScalar;
  bool isa_forced_ = false;
  KernelTable table_;
  RuntimeStats stats_;
  // Measured on Zen 4: up to four tokens an expert the long runs win.
  std::atomic<int64_t> few_tokens_{4};
  std::unique_ptr<Pool> pool_;
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_CPU_RUNTIME_H_

#include "bench/kernel_loop.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <thread>

#include "runtime/float_mode.h"
#include "runtime/scratch.h"

namespace jaxmoe {
namespace {

using Clock = std::chrono::steady_clock;
// The widest register tile; a thread's share of rows is a multiple, so that none is ragged.
constexpr int64_t kRowStep = 16;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Rows of BF16 or FP32 numbers that are small, of both signs and never subnormal.
std::vector<char> made_up_rows(ActivationType type, int64_t count) {
  std::vector<char> rows(static_cast<size_t>(count) * (type == ActivationType::kF32 ? 4 : 2));
  for (int64_t i = 0; i < count; ++i) {
    const float value = 1e-3f * static_cast<float>(i % 1999 - 999) + 1e-4f;
    if (type == ActivationType::kF32) {
      reinterpret_cast<float*>(rows.data())[i] = value;
    } else {
      reinterpret_cast<uint16_t*>(rows.data())[i] = float_to_bf16(value);
    }
  }
  return rows;
}

Status check_layer(const HostStore& store, int layer) {
  if (layer >= 0 && layer < store.num_layers()) return {};
  return Status::error("layer " + std::to_string(layer) + " of a store that has " +
                       std::to_string(store.num_layers()));
}

int64_t bytes_with_scales(const HostStore& store, int layer, Matrix which) {
  return store.matrix_bytes(layer, which) + store.scale_matrix_bytes(layer, which);
}

class EmptyJob final : public Job {
 public:
  void run_unit(int, int, uint32_t, int) noexcept override {}
};

}  // namespace

Status measure_kernel(CpuRuntime& runtime, const HostStore& store, int layer, Family family,
                      ActivationType type, int num_experts, int64_t m, int repeats,
                      Measured* measured) {
  Status status = check_layer(store, layer);
  if (!status.ok()) return status;
  const ExpertLayerSpec& spec = store.layer(layer);
  if (m < 1 || repeats < 1 || num_experts < 1 || num_experts > spec.num_experts) {
    return Status::error("wanted at least one row and one repeat, and 1 to " +
                         std::to_string(spec.num_experts) + " experts");
  }
  for (int e = 0; e < num_experts; ++e) {
    for (Matrix which : {Matrix::kGate, Matrix::kUp}) {
      status = store.check_has_data(layer, e, which);
      if (!status.ok()) return status;
    }
  }
  const MatmulKernel& kernel = runtime.kernel(family, spec.format, type);
  const int64_t n = spec.intermediate, k = spec.hidden;
  const std::vector<char> x = made_up_rows(type, m * k);
  std::vector<int32_t> row_ids(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) row_ids[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  Scratch prepared, panel, results;
  const size_t panel_bytes = kernel.panel_bytes == nullptr ? 0 : kernel.panel_bytes(m, k);
  if (!prepared.reserve(kernel.prepared_row_bytes(k) * static_cast<size_t>(m)) ||
      !panel.reserve(panel_bytes + 1) ||
      !results.reserve(static_cast<size_t>(m * n) * sizeof(float))) {
    return Status::error("out of memory for " + std::to_string(m) + " rows");
  }
  kernel.prepare(type, x.data(), k, k, 0, m, prepared.data());
  const void* operand = prepared.data();
  if (panel_bytes != 0) {
    kernel.make_panel(prepared.data(), k, row_ids.data(), m, panel.data());
    operand = panel.data();
  }
  float* y = reinterpret_cast<float*>(results.data());

  const std::vector<Placement> places = place_threads(runtime.topology(), runtime.num_threads());
  const int num_threads = static_cast<int>(places.size());
  std::barrier sync(num_threads);
  std::vector<Clock::time_point> ends(places.size());
  Clock::time_point start;  // before anyone begins
  auto body = [&](int idx) {
    const Placement place = places[static_cast<size_t>(idx)];
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(place.cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
    const FloatMode mode;
    kernel_thread_init(runtime.isa());
    // This thread's rows: its share of what its node holds.
    int64_t rank = 0, on_node = 0;
    for (int i = 0; i < num_threads; ++i) {
      if (places[static_cast<size_t>(i)].node != place.node) continue;
      rank += i < idx;
      ++on_node;
    }
    auto [node_begin, node_end] = node_rows(n, place.node, store.num_nodes());
    const int64_t tiles = (node_end - node_begin + kRowStep - 1) / kRowStep;
    const int64_t begin = std::min(node_end, node_begin + tiles * rank / on_node * kRowStep);
    const int64_t end = std::min(node_end, node_begin + tiles * (rank + 1) / on_node * kRowStep);
    // One round more than asked for: the first wakes pages and caches of the operands.
    for (int repeat = 0; repeat <= repeats; ++repeat) {
      sync.arrive_and_wait();
      if (idx == 0) start = Clock::now();
      sync.arrive_and_wait();
      for (int e = 0; e < num_experts; ++e) {
        for (Matrix which : {Matrix::kGate, Matrix::kUp}) {
          const WeightView w = store.view(layer, e, which, place.node);
          kernel.matmul(w, begin, end, operand, nullptr, m, y + begin, n);
        }
      }
      ends[static_cast<size_t>(idx)] = Clock::now();
      sync.arrive_and_wait();
      if (idx == 0 && repeat > 0) {
        const std::chrono::duration<double> taken =
            *std::max_element(ends.begin(), ends.end()) - start;
        measured->seconds.push_back(taken.count());
      }
    }
    kernel_thread_release(runtime.isa());
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
  measured->bytes = num_experts * (bytes_with_scales(store, layer, Matrix::kGate) +
                                   bytes_with_scales(store, layer, Matrix::kUp));
  measured->flops =
      4.0 * static_cast<double>(num_experts) * static_cast<double>(m * n) * static_cast<double>(k);
  return {};
}

Status measure_experts(CpuRuntime& runtime, const HostStore& store, int layer, Family family,
                       ActivationType type, int64_t num_tokens, int64_t per_token,
                       const int32_t* ids, int64_t calls, int repeats, Measured* measured) {
  Status status = check_layer(store, layer);
  if (!status.ok()) return status;
  if (num_tokens < 1 || per_token < 1 || calls < 1 || repeats < 1) {
    return Status::error("wanted at least one token, expert, call and repeat");
  }
  const int64_t hidden = store.layer(layer).hidden;
  const std::vector<char> x = made_up_rows(type, num_tokens * hidden);
  std::vector<float> weights(static_cast<size_t>(num_tokens * per_token),
                             1.0f / static_cast<float>(per_token));
  std::vector<float> y(static_cast<size_t>(num_tokens * hidden));
  ExpertsCall call;
  call.layer = layer;
  call.family = family;
  call.x_type = type;
  call.x = x.data();
  call.num_tokens = num_tokens;
  call.per_token = per_token;
  call.weights = weights.data();
  call.y = y.data();
  RuntimeStats& stats = runtime.stats();
  for (int repeat = 0; repeat <= repeats; ++repeat) {
    const uint64_t bytes = stats.experts_weight_bytes.load();
    const Clock::time_point start = Clock::now();
    for (int64_t c = 0; c < calls; ++c) {
      call.expert_ids = ids + c * num_tokens * per_token;
      status = experts(runtime, store, call);
      if (!status.ok()) return status;
    }
    if (repeat > 0) measured->seconds.push_back(seconds_since(start));
    measured->bytes = static_cast<int64_t>(stats.experts_weight_bytes.load() - bytes);
  }
  const int64_t pairs = calls * num_tokens * per_token;
  const int64_t none = std::count(ids, ids + pairs, -1);
  measured->flops = 6.0 * static_cast<double>(pairs - none) *
                    static_cast<double>(hidden * store.layer(layer).intermediate);
  return {};
}

Status measure_empty_job(CpuRuntime& runtime, int64_t calls, int repeats, Measured* measured) {
  if (calls < 1 || repeats < 1) return Status::error("wanted at least one call and one repeat");
  Pool& pool = runtime.pool();
  JobShape shape;
  shape.nodes = runtime.num_nodes();
  shape.spread(0, static_cast<uint32_t>(runtime.num_threads()));
  for (int repeat = 0; repeat <= repeats; ++repeat) {
    const Clock::time_point start = Clock::now();
    for (int64_t c = 0; c < calls; ++c) {
      EmptyJob job;
      JobSlot* slot = pool.acquire();
      pool.run(slot, &job, shape);
      pool.release(slot);
    }
    if (repeat > 0) measured->seconds.push_back(seconds_since(start));
  }
  return {};
}

}  // namespace jaxmoe

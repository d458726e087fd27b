// The bare kernel and the bare experts operation, measured: no XLA, no Python between two calls.
#ifndef JAXMOE_BENCH_KERNEL_LOOP_H_
#define JAXMOE_BENCH_KERNEL_LOOP_H_

#include <cstdint>
#include <vector>

#include "moe/experts.h"
#include "runtime/cpu_runtime.h"
#include "runtime/host_store.h"
#include "runtime/status.h"

namespace jaxmoe {

struct Measured {
  std::vector<double> seconds;  // of each repeat
  int64_t bytes = 0;            // of weights and scales that a repeat reads
  double flops = 0;             // of a repeat; a multiply-add counts as two
};

// The store's gate and up matrices of one layer, the first `num_experts` experts', each once a
// repeat: rows split over the runtime's threads (a thread takes rows of its NUMA node), one call of
// the kernel a matrix and thread. `m` activation rows of BF16 or FP32, prepared before. They must
// be loaded.
Status measure_kernel(CpuRuntime& runtime, const HostStore& store, int layer, Family family,
                      ActivationType type, int num_experts, int64_t m, int repeats,
                      Measured* measured);

// `calls` calls of the routed-experts operation a repeat, one after the other, each with its own
// ids [num_tokens, per_token] out of ids [calls, num_tokens, per_token].
Status measure_experts(CpuRuntime& runtime, const HostStore& store, int layer, Family family,
                       ActivationType type, int64_t num_tokens, int64_t per_token,
                       const int32_t* ids, int64_t calls, int repeats, Measured* measured);

// A job of one unit a thread that does nothing, `calls` times a repeat: what handing work to the
// awake pool and waiting for it costs.
Status measure_empty_job(CpuRuntime& runtime, int64_t calls, int repeats, Measured* measured);

}  // namespace jaxmoe

#endif  // JAXMOE_BENCH_KERNEL_LOOP_H_

// What the arithmetic units deliver when nothing else limits: the other roof that figures of
// products are stated against, measured in the same process and minute.
#ifndef JAXMOE_BENCH_PEAK_H_
#define JAXMOE_BENCH_PEAK_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace jaxmoe {

// One way of multiplying. `run` does `rounds` rounds and returns the floating-point operations of
// one (a multiply-add counts as two); what it computed goes to *sink, so that it is computed.
struct PeakLoop {
  const char* name;
  Isa isa;
  double (*run)(int64_t rounds, float* sink);
};

// The loops that a kernel of this instruction set could use.
std::vector<PeakLoop> peak_loops(Isa isa);

// Operations per second of one loop on all CPUs at once, each thread pinned; one figure a repeat.
std::vector<double> peak_flops(const PeakLoop& loop, const std::vector<int>& cpus, int repeats);

namespace peak_isa {
double fma_scalar(int64_t rounds, float* sink);
double fma_avx2(int64_t rounds, float* sink);
double fma_avx512(int64_t rounds, float* sink);
double dot_bf16_avx512(int64_t rounds, float* sink);
double tiles_bf16_amx(int64_t rounds, float* sink);
}  // namespace peak_isa

}  // namespace jaxmoe

#endif  // JAXMOE_BENCH_PEAK_H_

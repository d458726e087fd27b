#include "bench/peak.h"

namespace jaxmoe::peak_isa {
namespace {

typedef float V __attribute__((vector_size(16)));
constexpr int kSums = 12;
constexpr int kFlops = 8;
inline V zero() { return V{}; }
inline V operand(float x) { return V{x, x, x, x}; }
inline V step(V sum, V a, V b) { return sum + a * b; }
inline float first(V v) { return v[0]; }

#include "bench/peak_loop.inl"

}  // namespace

double fma_scalar(int64_t rounds, float* sink) { return run_sums(rounds, sink); }

}  // namespace jaxmoe::peak_isa

#include "bench/peak.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace jaxmoe::peak_isa {
namespace {

using V = __m256;
constexpr int kSums = 12;
constexpr int kFlops = 16;
inline V zero() { return _mm256_setzero_ps(); }
inline V operand(float x) { return _mm256_set1_ps(x); }
inline V step(V sum, V a, V b) { return _mm256_fmadd_ps(a, b, sum); }
inline float first(V v) { return _mm256_cvtss_f32(v); }

#include "bench/peak_loop.inl"

}  // namespace

double fma_avx2(int64_t rounds, float* sink) { return run_sums(rounds, sink); }

}  // namespace jaxmoe::peak_isa

#else

namespace jaxmoe::peak_isa {
double fma_avx2(int64_t rounds, float* sink) { return fma_scalar(rounds, sink); }
}  // namespace jaxmoe::peak_isa

#endif

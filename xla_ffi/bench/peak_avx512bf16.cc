#include "bench/peak.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace jaxmoe::peak_isa {
namespace {

using V = __m512;
constexpr int kSums = 16;
constexpr int kFlops = 64;
inline V zero() { return _mm512_setzero_ps(); }
inline V operand(float x) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(x < 0.5f ? 0x3A833A83 : 0x3F803F80));
}
inline V step(V sum, V a, V b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
inline float first(V v) { return _mm512_cvtss_f32(v); }

#include "bench/peak_loop.inl"

}  // namespace

double dot_bf16_avx512(int64_t rounds, float* sink) { return run_sums(rounds, sink); }

}  // namespace jaxmoe::peak_isa

#else

namespace jaxmoe::peak_isa {
double dot_bf16_avx512(int64_t rounds, float* sink) { return fma_scalar(rounds, sink); }
}  // namespace jaxmoe::peak_isa

#endif

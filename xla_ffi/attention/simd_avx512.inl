// Vectors of AVX-512, for the kernels of this folder. Included inside an anonymous
// namespace:
//   V, kWidth                 FP32 vector and its lanes
//   load, store, set1, add, sub, mul, fma(a, b, c) = a * b + c, div, max, hsum, hmax
//   widen(const uint16_t*)    kWidth BF16 values as FP32
//   pow2(V shifted)           2^n for shifted = 1.5 * 2^23 + n
//   zero_below(x, bound, y)   x < bound ? 0 : y, lane by lane

using V = __m512;
constexpr int64_t kWidth = 16;

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline float hsum(V v) { return _mm512_reduce_add_ps(v); }
inline float hmax(V v) { return _mm512_reduce_max_ps(v); }
inline V widen(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline V pow2(V shifted) {
  const __m512i n =
      _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x4B400000 - 127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(n, 23));
}
inline V zero_below(V x, float bound, V y) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_NLT_UQ), y);
}

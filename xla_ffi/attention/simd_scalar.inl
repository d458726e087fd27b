// Vectors of the baseline, for the kernels of this folder: SSE2 on x86-64, GCC's generic vectors
// elsewhere; no fused multiply-add. Included inside an anonymous namespace:
//   V, kWidth                 FP32 vector and its lanes
//   load, store, set1, add, sub, mul, fma(a, b, c) = a * b + c, div, max, hsum, hmax
//   widen(const uint16_t*)    kWidth BF16 values as FP32
//   pow2(V shifted)           2^n for shifted = 1.5 * 2^23 + n
//   zero_below(x, bound, y)   x < bound ? 0 : y, lane by lane

typedef float V __attribute__((vector_size(16)));
typedef float Unaligned __attribute__((vector_size(16), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(16)));
constexpr int64_t kWidth = 4;

inline V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline V set1(float x) { return V{x, x, x, x}; }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V max(V a, V b) { return a > b ? a : b; }
inline float hsum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float hmax(V v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
inline V widen(const uint16_t* p) {
  const Halves halves = *reinterpret_cast<const Halves*>(p);
  return reinterpret_cast<V>(__builtin_convertvector(halves, Words) << 16);
}
inline V pow2(V shifted) {
  return reinterpret_cast<V>((reinterpret_cast<Ints>(shifted) - 0x4B400000 + 127) << 23);
}
inline V zero_below(V x, float bound, V y) { return x < set1(bound) ? set1(0.0f) : y; }

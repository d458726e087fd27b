// The baseline form: SSE2 on x86-64, GCC's generic vectors elsewhere. No fused multiply-add.
#include "attention/attention_kernels.h"

namespace jaxmoe::attention_isa {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

typedef float V __attribute__((vector_size(16)));
typedef float Unaligned __attribute__((vector_size(16), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(16)));
constexpr int64_t kWidth = 4;
constexpr int kScoreKeys = 2;

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

#include "attention/attention_core.inl"

constexpr int kTileVectors = 2;  // 4 x 2 sums and 3 operands of 16 registers
inline int64_t block_q_ld(int64_t dim) { return dim; }
inline int64_t block_v_ld(int64_t dim) { return padded_dim(dim); }

#include "attention/attention_block_f32.inl"
//
#include "attention/attention_block.inl"

}  // namespace

AttentionKernels scalar_kernels() {
  return {"attention_scalar", padded_dim, attend_chunk, merge,     finish,
          attend_block,       false,      block_q_ld,   block_v_ld};
}

}  // namespace jaxmoe::attention_isa

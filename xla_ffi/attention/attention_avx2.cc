#include "attention/attention_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace jaxmoe::attention_isa {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

#include "attention/simd_avx2.inl"

constexpr int kScoreKeys = 2;  // 4 x 2 sums, 6 operands: 14 of 16 registers

#include "attention/attention_core.inl"

constexpr int kTileVectors = 2;  // 4 x 2 sums and 3 operands of 16 registers
inline int64_t block_q_ld(int64_t dim) { return dim; }
inline int64_t block_v_ld(int64_t dim) { return padded_dim(dim); }

#include "attention/attention_block_f32.inl"
//
#include "attention/attention_block.inl"

}  // namespace

AttentionKernels avx2_kernels() {
  return {"attention_avx2", padded_dim, attend_chunk, merge,     finish,
          attend_block,     false,      block_q_ld,   block_v_ld};
}

}  // namespace jaxmoe::attention_isa

#else

namespace jaxmoe::attention_isa {
AttentionKernels avx2_kernels() { return scalar_kernels(); }
}  // namespace jaxmoe::attention_isa

#endif

#include "attention/attention_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace jaxmoe::attention_isa {
namespace {

#include "attention/vector_avx512.inl"
//
#include "attention/attention_core.inl"

constexpr int kTileVectors = 4;  // 4 x 4 sums and 5 operands of 32 registers
inline int64_t block_q_ld(int64_t dim) { return dim; }
inline int64_t block_v_ld(int64_t dim) { return padded_dim(dim); }

#include "attention/attention_block_f32.inl"
//
#include "attention/attention_block.inl"

}  // namespace

AttentionKernels avx512_kernels() {
  return {"attention_avx512", padded_dim, attend_chunk, merge,     finish,
          attend_block,       false,      block_q_ld,   block_v_ld};
}

}  // namespace jaxmoe::attention_isa

#else

namespace jaxmoe::attention_isa {
AttentionKernels avx512_kernels() { return scalar_kernels(); }
}  // namespace jaxmoe::attention_isa

#endif

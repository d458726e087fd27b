// The baseline form: SSE2 on x86-64, GCC's generic vectors elsewhere. No fused multiply-add.
#include "attention/attention_kernels.h"

namespace jaxmoe::attention_isa {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

#include "attention/simd_scalar.inl"

constexpr int kScoreKeys = 2;

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

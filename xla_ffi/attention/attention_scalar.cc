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

}  // namespace

AttentionKernels scalar_kernels() {
  return {"attention_scalar", padded_dim, attend_chunk, merge, finish};
}

}  // namespace jaxmoe::attention_isa

#include "attention/attention_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace jaxmoe::attention_isa {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

#include "attention/simd_avx512.inl"

constexpr int kScoreKeys = 4;  // 4 x 4 sums, 8 operands: 24 of 32 registers

#include "attention/attention_core.inl"

}  // namespace

AttentionKernels avx512_kernels() {
  return {"attention_avx512", padded_dim, attend_chunk, merge, finish};
}

}  // namespace jaxmoe::attention_isa

#else

namespace jaxmoe::attention_isa {
AttentionKernels avx512_kernels() { return scalar_kernels(); }
}  // namespace jaxmoe::attention_isa

#endif

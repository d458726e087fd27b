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

}  // namespace

AttentionKernels avx2_kernels() {
  return {"attention_avx2", padded_dim, attend_chunk, merge, finish};
}

}  // namespace jaxmoe::attention_isa

#else

namespace jaxmoe::attention_isa {
AttentionKernels avx2_kernels() { return scalar_kernels(); }
}  // namespace jaxmoe::attention_isa

#endif

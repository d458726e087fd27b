#include "attention/gated_delta_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace jaxmoe::attention_isa {
namespace {

#include "attention/simd_avx512.inl"

// Chains of a sum over keys; with 2 vectors of columns 8 sums: two FMA ports of latency 4 kept
// busy.
constexpr int kChains = 4;

#include "attention/gated_delta_core.inl"

}  // namespace

GatedDeltaKernels avx512_delta_kernels() {
  return {"gated_delta_avx512", convolve, normalize, update};
}

}  // namespace jaxmoe::attention_isa

#else

namespace jaxmoe::attention_isa {
GatedDeltaKernels avx512_delta_kernels() { return scalar_delta_kernels(); }
}  // namespace jaxmoe::attention_isa

#endif

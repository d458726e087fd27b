#include "attention/gated_delta_kernels.h"

namespace jaxmoe::attention_isa {
namespace {

#include "attention/simd_scalar.inl"

// Chains of a sum over keys; as in the other files.
constexpr int kChains = 4;

#include "attention/gated_delta_core.inl"

}  // namespace

GatedDeltaKernels scalar_delta_kernels() {
  return {"gated_delta_scalar", convolve, normalize, update};
}

}  // namespace jaxmoe::attention_isa

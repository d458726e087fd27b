#include "attention/gated_delta_kernels.h"

namespace jaxmoe::attention_isa {
namespace {

#include "attention/simd_scalar.inl"

#include "attention/vexp.inl"

#include "attention/gated_delta_core.inl"

}  // namespace

GatedDeltaKernels scalar_delta_kernels() {
  return {"gated_delta_scalar", convolve, normalize, update};
}

}  // namespace jaxmoe::attention_isa

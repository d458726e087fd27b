// The XLA FFI handlers of platform "cpu", and those of platform "CUDA" (...Cuda). They check and
// bind; the work is done by moe/ and attention/.
#ifndef JAXMOE_HANDLERS_HANDLERS_H_
#define JAXMOE_HANDLERS_HANDLERS_H_

#include "xla/ffi/api/c_api.h"

namespace jaxmoe {

extern "C" {
XLA_FFI_Error* JaxmoeLinear(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeHeadLinear(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeExperts(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeExpertsGroup(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeExpertsSubmit(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeExpertsSubmitPacked(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeExpertsWait(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeKvWrite(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoePagedAttention(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeMark(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeGatedDelta(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeIndexSelect(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeSlotAcquire(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeSlotRelease(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeSlotAcquireCuda(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeSlotReleaseCuda(XLA_FFI_CallFrame* frame);

XLA_FFI_Error* JaxmoeExpertsCuda(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeExpertsSubmitCuda(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeExpertsSubmitPackedCuda(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxmoeExpertsWaitCuda(XLA_FFI_CallFrame* frame);
}

}  // namespace jaxmoe

#endif  // JAXMOE_HANDLERS_HANDLERS_H_

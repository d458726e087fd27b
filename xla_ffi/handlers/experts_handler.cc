#include <cstring>

#include "handlers/checks.h"
#include "handlers/experts_binding.h"
#include "handlers/experts_signatures.h"
#include "handlers/handlers.h"
#include "moe/experts.h"

namespace jaxmoe {
namespace {

ffi::Error experts_impl(ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                        ffi::RemainingArgs biases, ffi::Result<ffi::AnyBuffer> y,
                        int64_t runtime_id, int64_t store_id, int64_t layer, int64_t family,
                        float alpha, float limit, float up_offset) {
  constexpr const char* kOp = "experts";
  ExpertsObjects objects;
  ExpertsCall call;
  const bool has_biases = biases.size() != 0;
  JAXMOE_RETURN_IF_ERROR(bind_experts(
      kOp, x, ids, weights, biases,
      {runtime_id, store_id, layer, family, alpha, limit, up_offset, has_biases}, &objects, &call));
  if (has_biases && biases.size() != 2) {
    return failure("experts: " + std::to_string(biases.size()) +
                   " bias arrays; wanted those of gate and up, or none");
  }
  JAXMOE_RETURN_IF_ERROR(
      expect(kOp, "the result", *y, ffi::DataType::F32, {call.num_tokens, x.dimensions()[1]}));
  call.y = static_cast<float*>(y->untyped_data());
  return to_error(experts(*objects.runtime->cpu, *objects.store, call));
}

// `slot` names the microbatch where memory is kept per slot; here tickets do.
ffi::Error submit_impl(ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                       ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> ticket,
                       ffi::RemainingRets others_out, int64_t runtime_id, int64_t store_id,
                       int64_t layer, int64_t family, float alpha, float limit, float up_offset,
                       bool has_biases, int64_t /*slot*/) {
  constexpr const char* kOp = "experts_submit";
  ExpertsObjects objects;
  ExpertsCall call;
  JAXMOE_RETURN_IF_ERROR(bind_experts(
      kOp, x, ids, weights, rest,
      {runtime_id, store_id, layer, family, alpha, limit, up_offset, has_biases}, &objects, &call));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the ticket", *ticket, ffi::DataType::S32, {1}));
  JAXMOE_RETURN_IF_ERROR(check_pass_through(kOp, rest, has_biases ? 2 : 0, others_out));
  return to_error(objects.runtime->experts.submit(objects.store, call,
                                                  static_cast<int32_t*>(ticket->untyped_data())));
}

ffi::Error submit_packed_impl(ffi::AnyBuffer packed, ffi::RemainingArgs rest,
                              ffi::Result<ffi::AnyBuffer> ticket, ffi::RemainingRets others_out,
                              int64_t runtime_id, int64_t store_id, int64_t layer, int64_t family,
                              float alpha, float limit, float up_offset, bool has_biases,
                              int64_t /*slot*/, int64_t num_tokens, int64_t per_token,
                              bool x_is_bf16) {
  constexpr const char* kOp = "experts_submit";
  ExpertsObjects objects;
  ExpertsCall call;
  JAXMOE_RETURN_IF_ERROR(bind_packed_experts(
      kOp, packed, {num_tokens, per_token, x_is_bf16}, rest,
      {runtime_id, store_id, layer, family, alpha, limit, up_offset, has_biases}, &objects, &call));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the ticket", *ticket, ffi::DataType::S32, {1}));
  JAXMOE_RETURN_IF_ERROR(check_pass_through(kOp, rest, has_biases ? 2 : 0, others_out));
  return to_error(objects.runtime->experts.submit(objects.store, call,
                                                  static_cast<int32_t*>(ticket->untyped_data())));
}

ffi::Error wait_impl(ffi::AnyBuffer ticket, ffi::RemainingArgs others,
                     ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets others_out,
                     int64_t runtime_id, int64_t /*slot*/) {
  constexpr const char* kOp = "experts_wait";
  ExpertsObjects objects;
  JAXMOE_RETURN_IF_ERROR(find_runtime(kOp, runtime_id, &objects));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the ticket", ticket, ffi::DataType::S32, {1}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the result", *y, ffi::DataType::F32, {-1, -1}));
  JAXMOE_RETURN_IF_ERROR(check_pass_through(kOp, others, 0, others_out));
  return to_error(objects.runtime->experts.wait(*static_cast<const int32_t*>(ticket.untyped_data()),
                                                y->dimensions()[0], y->dimensions()[1],
                                                static_cast<float*>(y->untyped_data())));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExperts, experts_impl, bind_experts(ffi::Ffi::Bind()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExpertsSubmit, submit_impl, bind_submit(ffi::Ffi::Bind()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExpertsSubmitPacked, submit_packed_impl,
                              bind_submit_packed(ffi::Ffi::Bind()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExpertsWait, wait_impl, bind_wait(ffi::Ffi::Bind()));

}  // namespace jaxmoe

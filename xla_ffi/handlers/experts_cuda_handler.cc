// The experts' handlers of platform "CUDA": the same targets, operands and attributes as on "cpu".
// They run while a program is enqueued on XLA's stream, and only enqueue.
//
// They do not carry kCmdBufferCompatible: a captured call would repeat the generation it was
// captured with. Inside a program with CUDA graphs they merely split the graph.
#include "handlers/checks.h"
#include "handlers/experts_binding.h"
#include "handlers/experts_signatures.h"
#include "handlers/handlers.h"
#include "moe/experts_device.h"

namespace jaxmoe {
namespace {

DevicePlace place_of(DeviceStream stream, int32_t ordinal, ffi::RunId run, int64_t slot) {
  DevicePlace place;
  place.ordinal = ordinal;
  place.slot = slot >= 0 && slot < ExpertsDevice::kMaxSlots ? static_cast<int>(slot) : -1;
  place.run_id = run.run_id;
  place.stream = stream;
  return place;
}

ffi::Error experts_impl(DeviceStream stream, int32_t ordinal, ffi::RunId run, ffi::AnyBuffer x,
                        ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::RemainingArgs biases,
                        ffi::Result<ffi::AnyBuffer> y, int64_t runtime_id, int64_t store_id,
                        int64_t layer, int64_t family, float alpha, float limit, float up_offset) {
  constexpr const char* kOp = "experts";
  ExpertsObjects objects;
  ExpertsCall call;
  const bool has_biases = biases.size() != 0;
  JAXMOE_RETURN_IF_ERROR(bind_experts(
      kOp, x, ids, weights, biases,
      {runtime_id, store_id, layer, family, alpha, limit, up_offset, has_biases}, &objects, &call));
  const int64_t hidden = x.dimensions()[1];
  JAXMOE_RETURN_IF_ERROR(
      expect(kOp, "the result", *y, ffi::DataType::F32, {call.num_tokens, hidden}));
  ExpertsDevice& device = objects.runtime->device_experts();
  const DevicePlace place = place_of(stream, ordinal, run, ExpertsDevice::kWholeSlot);
  JAXMOE_RETURN_IF_ERROR(device.submit(place, objects.store, call));
  return to_error(
      device.wait(place, call.num_tokens, hidden, static_cast<float*>(y->untyped_data())));
}

// The ticket orders the two calls in the program, nothing is written to it: which wait belongs to
// which submit must be known while they are enqueued, and `slot` says it.
ffi::Error submit_impl(DeviceStream stream, int32_t ordinal, ffi::RunId run, ffi::AnyBuffer x,
                       ffi::AnyBuffer ids, ffi::AnyBuffer weights, ffi::RemainingArgs rest,
                       ffi::Result<ffi::AnyBuffer> ticket, ffi::RemainingRets others_out,
                       int64_t runtime_id, int64_t store_id, int64_t layer, int64_t family,
                       float alpha, float limit, float up_offset, bool has_biases, int64_t slot) {
  constexpr const char* kOp = "experts_submit";
  ExpertsObjects objects;
  ExpertsCall call;
  JAXMOE_RETURN_IF_ERROR(bind_experts(
      kOp, x, ids, weights, rest,
      {runtime_id, store_id, layer, family, alpha, limit, up_offset, has_biases}, &objects, &call));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the ticket", *ticket, ffi::DataType::S32, {1}));
  JAXMOE_RETURN_IF_ERROR(check_pass_through(kOp, rest, has_biases ? 2 : 0, others_out));
  return to_error(objects.runtime->device_experts().submit(place_of(stream, ordinal, run, slot),
                                                           objects.store, call));
}

ffi::Error submit_packed_impl(DeviceStream stream, int32_t ordinal, ffi::RunId run,
                              ffi::AnyBuffer packed, ffi::RemainingArgs rest,
                              ffi::Result<ffi::AnyBuffer> ticket, ffi::RemainingRets others_out,
                              int64_t runtime_id, int64_t store_id, int64_t layer, int64_t family,
                              float alpha, float limit, float up_offset, bool has_biases,
                              int64_t slot, int64_t num_tokens, int64_t per_token, bool x_is_bf16) {
  constexpr const char* kOp = "experts_submit";
  ExpertsObjects objects;
  ExpertsCall call;
  JAXMOE_RETURN_IF_ERROR(bind_packed_experts(
      kOp, packed, {num_tokens, per_token, x_is_bf16}, rest,
      {runtime_id, store_id, layer, family, alpha, limit, up_offset, has_biases}, &objects, &call));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the ticket", *ticket, ffi::DataType::S32, {1}));
  JAXMOE_RETURN_IF_ERROR(check_pass_through(kOp, rest, has_biases ? 2 : 0, others_out));
  return to_error(objects.runtime->device_experts().submit(place_of(stream, ordinal, run, slot),
                                                           objects.store, call));
}

ffi::Error wait_impl(DeviceStream stream, int32_t ordinal, ffi::RunId run, ffi::AnyBuffer ticket,
                     ffi::RemainingArgs others, ffi::Result<ffi::AnyBuffer> y,
                     ffi::RemainingRets others_out, int64_t runtime_id, int64_t slot) {
  constexpr const char* kOp = "experts_wait";
  ExpertsObjects objects;
  JAXMOE_RETURN_IF_ERROR(find_runtime(kOp, runtime_id, &objects));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the ticket", ticket, ffi::DataType::S32, {1}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the result", *y, ffi::DataType::F32, {-1, -1}));
  JAXMOE_RETURN_IF_ERROR(check_pass_through(kOp, others, 0, others_out));
  return to_error(objects.runtime->device_experts().wait(place_of(stream, ordinal, run, slot),
                                                         y->dimensions()[0], y->dimensions()[1],
                                                         static_cast<float*>(y->untyped_data())));
}

auto device_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<DeviceStream>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::RunId>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExpertsCuda, experts_impl, bind_experts(device_binding()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExpertsSubmitCuda, submit_impl, bind_submit(device_binding()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExpertsSubmitPackedCuda, submit_packed_impl,
                              bind_submit_packed(device_binding()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExpertsWaitCuda, wait_impl, bind_wait(device_binding()));

}  // namespace jaxmoe

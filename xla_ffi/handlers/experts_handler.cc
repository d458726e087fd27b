#include <cstring>

#include "handlers/checks.h"
#include "handlers/handlers.h"
#include "handlers/registries.h"
#include "moe/experts.h"

namespace jaxmoe {
namespace {

struct Objects {
  std::shared_ptr<NativeRuntime> runtime;
  std::shared_ptr<HostStore> store;
};

Status find_runtime(const char* op, int64_t runtime_id, Objects* objects) {
  objects->runtime = runtimes().get(runtime_id);
  if (objects->runtime != nullptr) return {};
  return Status::error(std::string(op) + ": no runtime has id " + std::to_string(runtime_id) +
                       " (was it closed?)");
}

// Checks everything but y, whose buffer only some of the operations have.
Status bind_call(const char* op, ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                 int64_t runtime_id, int64_t store_id, int64_t layer, int64_t family,
                 Objects* objects, ExpertsCall* call) {
  Status status = find_runtime(op, runtime_id, objects);
  if (!status.ok()) return status;
  objects->store = stores().get(store_id);
  if (objects->store == nullptr) {
    return Status::error(std::string(op) + ": no host store has id " + std::to_string(store_id) +
                         " (was it closed?)");
  }
  if (layer < 0 || layer >= objects->store->num_layers()) {
    return Status::error(std::string(op) + ": MoE layer " + std::to_string(layer) +
                         " of a store that has " + std::to_string(objects->store->num_layers()));
  }
  std::optional<Family> kind = family_of(family);
  if (!kind) {
    return Status::error(std::string(op) + ": family " + std::to_string(family) +
                         "; wanted 0 (vector) or 1 (matrix)");
  }
  const int64_t hidden = objects->store->layer(static_cast<int>(layer)).hidden;
  status = expect_activation(op, "x", x, {-1, hidden}, &call->x_type);
  if (!status.ok()) return status;
  call->num_tokens = x.dimensions()[0];
  status = expect(op, "expert_ids", ids, ffi::DataType::S32, {call->num_tokens, -1});
  if (!status.ok()) return status;
  call->per_token = ids.dimensions()[1];
  status = expect(op, "combine_weights", weights, ffi::DataType::F32,
                  {call->num_tokens, call->per_token});
  if (!status.ok()) return status;
  call->layer = static_cast<int>(layer);
  call->family = *kind;
  call->x = x.untyped_data();
  call->expert_ids = static_cast<const int32_t*>(ids.untyped_data());
  call->weights = static_cast<const float*>(weights.untyped_data());
  return {};
}

// With two more arrays, f32 [E, F]: biases of gate and up.
ffi::Error experts_impl(ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                        ffi::RemainingArgs biases, ffi::Result<ffi::AnyBuffer> y,
                        int64_t runtime_id, int64_t store_id, int64_t layer, int64_t family,
                        float alpha, float limit) {
  Objects objects;
  ExpertsCall call;
  JAXMOE_RETURN_IF_ERROR(
      bind_call("experts", x, ids, weights, runtime_id, store_id, layer, family, &objects, &call));
  JAXMOE_RETURN_IF_ERROR(expect("experts", "the result", *y, ffi::DataType::F32,
                                {call.num_tokens, x.dimensions()[1]}));
  call.y = static_cast<float*>(y->untyped_data());
  call.alpha = alpha;
  call.limit = limit;
  if (biases.size() != 0) {
    if (biases.size() != 2) {
      return failure("experts: " + std::to_string(biases.size()) +
                     " bias arrays; wanted those of gate and up, or none");
    }
    const ExpertLayerSpec& shape = objects.store->layer(call.layer);
    const float** places[] = {&call.gate_bias, &call.up_bias};
    for (size_t i = 0; i < 2; ++i) {
      ffi::ErrorOr<ffi::AnyBuffer> bias = biases.get<ffi::AnyBuffer>(i);
      if (!bias.has_value()) return bias.error();
      JAXMOE_RETURN_IF_ERROR(expect("experts", i == 0 ? "the gate bias" : "the up bias", *bias,
                                    ffi::DataType::F32, {shape.num_experts, shape.intermediate}));
      *places[i] = static_cast<const float*>(bias->untyped_data());
    }
  }
  return to_error(experts(*objects.runtime->cpu, *objects.store, call));
}

ffi::Error submit_impl(ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                       ffi::RemainingArgs others, ffi::Result<ffi::AnyBuffer> ticket,
                       ffi::RemainingRets others_out, int64_t runtime_id, int64_t store_id,
                       int64_t layer, int64_t family) {
  constexpr const char* kOp = "experts_submit";
  Objects objects;
  ExpertsCall call;
  JAXMOE_RETURN_IF_ERROR(
      bind_call(kOp, x, ids, weights, runtime_id, store_id, layer, family, &objects, &call));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the ticket", *ticket, ffi::DataType::S32, {1}));
  ffi::Error passed = check_pass_through(kOp, others, others_out);
  if (passed.failure()) return passed;
  return to_error(objects.runtime->experts.submit(objects.store, call,
                                                  static_cast<int32_t*>(ticket->untyped_data())));
}

ffi::Error wait_impl(ffi::AnyBuffer ticket, ffi::RemainingArgs others,
                     ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets others_out,
                     int64_t runtime_id) {
  constexpr const char* kOp = "experts_wait";
  Objects objects;
  JAXMOE_RETURN_IF_ERROR(find_runtime(kOp, runtime_id, &objects));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the ticket", ticket, ffi::DataType::S32, {1}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the result", *y, ffi::DataType::F32, {-1, -1}));
  ffi::Error passed = check_pass_through(kOp, others, others_out);
  if (passed.failure()) return passed;
  return to_error(objects.runtime->experts.wait(*static_cast<const int32_t*>(ticket.untyped_data()),
                                                y->dimensions()[0], y->dimensions()[1],
                                                static_cast<float*>(y->untyped_data())));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExperts, experts_impl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("runtime_id")
                                  .Attr<int64_t>("store_id")
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("family")
                                  .Attr<float>("alpha")
                                  .Attr<float>("limit"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExpertsSubmit, submit_impl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<int64_t>("runtime_id")
                                  .Attr<int64_t>("store_id")
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("family"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExpertsWait, wait_impl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<int64_t>("runtime_id"));

}  // namespace jaxmoe

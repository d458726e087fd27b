#include "handlers/experts_binding.h"

#include <string>

namespace jaxmoe {

Status find_runtime(const char* op, int64_t runtime_id, ExpertsObjects* objects) {
  objects->runtime = runtimes().get(runtime_id);
  if (objects->runtime != nullptr) return {};
  return Status::error(std::string(op) + ": no runtime has id " + std::to_string(runtime_id) +
                       " (was it closed?)");
}

namespace {

// The objects and the layer, with its shape.
Status bind_layer(const char* op, const ExpertsAttributes& attributes, ExpertsObjects* objects,
                  ExpertsCall* call) {
  Status status = find_runtime(op, attributes.runtime_id, objects);
  if (!status.ok()) return status;
  objects->store = stores().get(attributes.store_id);
  if (objects->store == nullptr) {
    return Status::error(std::string(op) + ": no host store has id " +
                         std::to_string(attributes.store_id) + " (was it closed?)");
  }
  if (attributes.layer < 0 || attributes.layer >= objects->store->num_layers()) {
    return Status::error(std::string(op) + ": MoE layer " + std::to_string(attributes.layer) +
                         " of a store that has " + std::to_string(objects->store->num_layers()));
  }
  std::optional<Family> kind = family_of(attributes.family);
  if (!kind) {
    return Status::error(std::string(op) + ": family " + std::to_string(attributes.family) +
                         "; wanted 0 (vector) or 1 (matrix)");
  }
  call->layer = static_cast<int>(attributes.layer);
  call->family = *kind;
  call->alpha = attributes.alpha;
  call->limit = attributes.limit;
  call->up_offset = attributes.up_offset;
  return {};
}

Status bind_biases(const char* op, const ffi::RemainingArgs& rest, const ExpertLayerSpec& shape,
                   ExpertsCall* call) {
  if (rest.size() < 2) {
    return Status::error(std::string(op) + ": " + std::to_string(rest.size()) +
                         " bias arrays; wanted those of gate and up, or none");
  }
  const float** places[] = {&call->gate_bias, &call->up_bias};
  for (size_t i = 0; i < 2; ++i) {
    ffi::ErrorOr<ffi::AnyBuffer> bias = rest.get<ffi::AnyBuffer>(i);
    if (!bias.has_value()) return Status::error(bias.error().message());
    Status status = expect(op, i == 0 ? "the gate bias" : "the up bias", *bias, ffi::DataType::F32,
                           {shape.num_experts, shape.intermediate});
    if (!status.ok()) return status;
    *places[i] = static_cast<const float*>(bias->untyped_data());
  }
  return {};
}

}  // namespace

Status bind_experts(const char* op, ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                    const ffi::RemainingArgs& rest, const ExpertsAttributes& attributes,
                    ExpertsObjects* objects, ExpertsCall* call) {
  Status status = bind_layer(op, attributes, objects, call);
  if (!status.ok()) return status;
  const ExpertLayerSpec& shape = objects->store->layer(call->layer);
  status = expect_activation(op, "x", x, {-1, shape.hidden}, &call->x_type);
  if (!status.ok()) return status;
  call->num_tokens = x.dimensions()[0];
  status = expect(op, "expert_ids", ids, ffi::DataType::S32, {call->num_tokens, -1});
  if (!status.ok()) return status;
  call->per_token = ids.dimensions()[1];
  status = expect(op, "combine_weights", weights, ffi::DataType::F32,
                  {call->num_tokens, call->per_token});
  if (!status.ok()) return status;
  call->x = x.untyped_data();
  call->expert_ids = static_cast<const int32_t*>(ids.untyped_data());
  call->weights = static_cast<const float*>(weights.untyped_data());
  return attributes.has_biases ? bind_biases(op, rest, shape, call) : Status();
}

Status bind_packed_experts(const char* op, ffi::AnyBuffer packed, const PackedShape& shape,
                           const ffi::RemainingArgs& rest, const ExpertsAttributes& attributes,
                           ExpertsObjects* objects, ExpertsCall* call) {
  Status status = bind_layer(op, attributes, objects, call);
  if (!status.ok()) return status;
  const ExpertLayerSpec& layer = objects->store->layer(call->layer);
  if (shape.num_tokens < 0 || shape.per_token < 0 || (shape.x_is_bf16 && layer.hidden % 2 != 0)) {
    return Status::error(std::string(op) + ": " + std::to_string(shape.num_tokens) + " tokens of " +
                         std::to_string(layer.hidden) + " and " + std::to_string(shape.per_token) +
                         " experts cannot be packed");
  }
  const int64_t x_words = shape.num_tokens * layer.hidden / (shape.x_is_bf16 ? 2 : 1);
  const int64_t pairs = shape.num_tokens * shape.per_token;
  status = expect(op, "the packed x, ids and weights", packed, ffi::DataType::S32,
                  {x_words + 2 * pairs});
  if (!status.ok()) return status;
  const int32_t* words = static_cast<const int32_t*>(packed.untyped_data());
  call->num_tokens = shape.num_tokens;
  call->per_token = shape.per_token;
  call->x_type = shape.x_is_bf16 ? ActivationType::kBf16 : ActivationType::kF32;
  call->x = words;
  call->expert_ids = words + x_words;
  call->weights = reinterpret_cast<const float*>(words + x_words + pairs);
  return attributes.has_biases ? bind_biases(op, rest, layer, call) : Status();
}

}  // namespace jaxmoe

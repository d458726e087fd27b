// experts_group: the share of a group of a layer's experts, whose weights are operands. What the
// CPU platform computes with a ring's slot.
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "handlers/checks.h"
#include "handlers/experts_binding.h"
#include "handlers/handlers.h"
#include "moe/experts.h"

namespace jaxmoe {
namespace {

constexpr const char* kOp = "experts_group";

// Binds gate, up, down [X, N, K] or (scales) their scales: the operands from `first` on.
Status bind_matrices(const ffi::RemainingArgs& rest, size_t first, bool scales,
                     const ExpertLayerSpec& spec, std::array<const uint8_t*, kNumMatrices>* data) {
  const FormatInfo& info = format_info(spec.format);
  for (int m = 0; m < kNumMatrices; ++m) {
    const int64_t n = m == 2 ? spec.hidden : spec.intermediate;
    const int64_t k = m == 2 ? spec.intermediate : spec.hidden;
    const std::string name =
        std::string(matrix_name(static_cast<Matrix>(m))) + (scales ? "'s scales" : "");
    ffi::ErrorOr<ffi::AnyBuffer> buffer = rest.get<ffi::AnyBuffer>(first + static_cast<size_t>(m));
    if (!buffer.has_value()) return Status::error(buffer.error().message());
    const auto [rows, cols] =
        scales ? scale_dims(spec.format, n, k) : std::pair(n, info.bits == 4 ? k / 2 : k);
    const ffi::DataType type = scales ? data_type(info.scale_type) : data_type(spec.format);
    Status status = expect(kOp, name.c_str(), *buffer, type, {spec.num_experts, rows, cols});
    if (!status.ok()) return status;
    (*data)[static_cast<size_t>(m)] = static_cast<const uint8_t*>(buffer->untyped_data());
  }
  return {};
}

// rest: gate, up, down; where the format has scales theirs; with has_biases those of gate and up,
// f32 [X, F].
ffi::Error experts_group_impl(ffi::AnyBuffer y, ffi::AnyBuffer x, ffi::AnyBuffer ids,
                              ffi::AnyBuffer weights, ffi::RemainingArgs rest,
                              ffi::Result<ffi::AnyBuffer> out, int64_t runtime_id,
                              int64_t first_expert, int64_t family, int64_t format_code,
                              float alpha, float limit, float up_offset, bool has_biases) {
  ExpertsObjects objects;
  JAXMOE_RETURN_IF_ERROR(find_runtime(kOp, runtime_id, &objects));
  std::optional<Family> kind = family_of(family);
  std::optional<WeightFormat> format = weight_format(format_code);
  if (!kind || !format || first_expert < 0 || first_expert > INT32_MAX) {
    return failure(std::string(kOp) + ": family " + std::to_string(family) + ", format " +
                   std::to_string(format_code) + ", first expert " + std::to_string(first_expert) +
                   "; wanted 0 or 1, 0 to " + std::to_string(kNumFormats - 1) +
                   ", and an expert's number");
  }
  const FormatInfo& info = format_info(*format);
  const size_t wanted = kNumMatrices * (info.scaled() ? 2 : 1) + (has_biases ? 2 : 0);
  if (rest.size() != wanted) {
    return failure(std::string(kOp) + ": " + std::to_string(rest.size()) +
                   " arrays of weights, scales and biases; wanted " + std::to_string(wanted) +
                   " for format " + info.name);
  }
  ExpertsCall call;
  JAXMOE_RETURN_IF_ERROR(expect_activation(kOp, "x", x, {-1, -1}, &call.x_type));
  call.num_tokens = x.dimensions()[0];
  const int64_t hidden = x.dimensions()[1];
  ffi::ErrorOr<ffi::AnyBuffer> gate = rest.get<ffi::AnyBuffer>(0);
  if (!gate.has_value()) return gate.error();
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "gate", *gate, data_type(*format), {-1, -1, -1}));
  const ExpertLayerSpec spec{gate->dimensions()[0], gate->dimensions()[1], hidden, *format};
  if (spec.num_experts < 1 || spec.intermediate < 1 || hidden < 1 ||
      !columns_suit(*format, hidden) || !columns_suit(*format, spec.intermediate)) {
    return failure(std::string(kOp) + ": gate is " + describe(*gate) + " and x " + describe(x) +
                   ", which cannot be of format " + info.name);
  }
  std::array<const uint8_t*, kNumMatrices> data = {}, scales = {};
  JAXMOE_RETURN_IF_ERROR(bind_matrices(rest, 0, false, spec, &data));
  if (info.scaled()) {
    JAXMOE_RETURN_IF_ERROR(bind_matrices(rest, kNumMatrices, true, spec, &scales));
  }
  for (size_t i = 0; has_biases && i < 2; ++i) {
    ffi::ErrorOr<ffi::AnyBuffer> bias = rest.get<ffi::AnyBuffer>(wanted - 2 + i);
    if (!bias.has_value()) return bias.error();
    JAXMOE_RETURN_IF_ERROR(expect(kOp, i == 0 ? "the gate bias" : "the up bias", *bias,
                                  ffi::DataType::F32, {spec.num_experts, spec.intermediate}));
    (i == 0 ? call.gate_bias : call.up_bias) = static_cast<const float*>(bias->untyped_data());
  }
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "expert_ids", ids, ffi::DataType::S32, {call.num_tokens, -1}));
  call.per_token = ids.dimensions()[1];
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "combine_weights", weights, ffi::DataType::F32,
                                {call.num_tokens, call.per_token}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "y", y, ffi::DataType::F32, {call.num_tokens, hidden}));
  JAXMOE_RETURN_IF_ERROR(
      expect(kOp, "the result", *out, ffi::DataType::F32, {call.num_tokens, hidden}));
  if (out->untyped_data() != y.untyped_data()) {
    return failure(std::string(kOp) +
                   ": the result has another buffer than y: alias it to its operand");
  }
  call.family = *kind;
  call.x = x.untyped_data();
  call.expert_ids = static_cast<const int32_t*>(ids.untyped_data());
  call.weights = static_cast<const float*>(weights.untyped_data());
  call.y = static_cast<float*>(out->untyped_data());
  call.add = true;
  call.first_expert = static_cast<int32_t>(first_expert);
  call.alpha = alpha;
  call.limit = limit;
  call.up_offset = up_offset;
  return to_error(experts(*objects.runtime->cpu, BufferExperts(spec, data, scales), call));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeExpertsGroup, experts_group_impl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("runtime_id")
                                  .Attr<int64_t>("first_expert")
                                  .Attr<int64_t>("family")
                                  .Attr<int64_t>("format")
                                  .Attr<float>("alpha")
                                  .Attr<float>("limit")
                                  .Attr<float>("up_offset")
                                  .Attr<bool>("has_biases"));

}  // namespace jaxmoe

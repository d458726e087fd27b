#include "attention/gated_delta.h"
#include "attention/gated_delta_kernels.h"
#include "handlers/checks.h"
#include "handlers/handlers.h"
#include "handlers/registries.h"

namespace jaxmoe {
namespace {

const float* floats(const ffi::AnyBuffer& buffer) {
  return static_cast<const float*>(buffer.untyped_data());
}
const int32_t* ints(const ffi::AnyBuffer& buffer) {
  return static_cast<const int32_t*>(buffer.untyped_data());
}

// qkv [T, C], decay_input and rate_input [T, HV], conv_weight [W, C], a_log and dt_bias [HV],
// conv_state [S, W - 1, C], delta_state [S, HV, K, V], token_rows and positions [T], state_from and
// state_to [R], state_saves [T]; out [T, HV, V] and both states in their operands' buffers.
ffi::Error gated_delta_impl(ffi::AnyBuffer qkv, ffi::AnyBuffer decay_input,
                            ffi::AnyBuffer rate_input, ffi::AnyBuffer conv_weight,
                            ffi::AnyBuffer a_log, ffi::AnyBuffer dt_bias, ffi::AnyBuffer conv_state,
                            ffi::AnyBuffer delta_state, ffi::AnyBuffer token_rows,
                            ffi::AnyBuffer positions, ffi::AnyBuffer state_from,
                            ffi::AnyBuffer state_to, ffi::AnyBuffer state_saves,
                            ffi::Result<ffi::AnyBuffer> out,
                            ffi::Result<ffi::AnyBuffer> new_conv_state,
                            ffi::Result<ffi::AnyBuffer> new_delta_state, int64_t runtime_id,
                            int64_t num_key_heads) {
  constexpr const char* kOp = "gated_delta";
  constexpr ffi::DataType kF32 = ffi::DataType::F32, kS32 = ffi::DataType::S32;
  std::shared_ptr<NativeRuntime> runtime = runtimes().get(runtime_id);
  if (runtime == nullptr) {
    return failure(std::string(kOp) + ": no runtime has id " + std::to_string(runtime_id) +
                   " (was it closed?)");
  }
  GatedDeltaCall call;
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "delta_state", delta_state, kF32, {-1, -1, -1, -1}));
  Dims state = delta_state.dimensions();
  call.num_slots = state[0];
  call.num_value_heads = state[1];
  call.key_dim = state[2];
  call.value_dim = state[3];
  call.num_key_heads = num_key_heads;
  if (num_key_heads < 1 || call.num_value_heads < 1 || call.num_value_heads % num_key_heads != 0 ||
      call.key_dim < 1 || call.value_dim < 1 || call.key_dim % kDeltaLanes != 0 ||
      call.value_dim % kDeltaLanes != 0) {
    return failure(std::string(kOp) + ": delta_state is " + describe(delta_state) + " with " +
                   std::to_string(num_key_heads) +
                   " key heads; wanted value heads in a multiple of the key heads, and dimensions "
                   "in multiples of " +
                   std::to_string(kDeltaLanes));
  }
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "qkv", qkv, kF32, {-1, call.channels()}));
  call.num_tokens = qkv.dimensions()[0];
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "conv_weight", conv_weight, kF32, {-1, call.channels()}));
  call.conv_width = conv_weight.dimensions()[0];
  if (call.conv_width < 2 || call.conv_width > kMostConvWidth) {
    return failure(std::string(kOp) + ": conv_weight is " + describe(conv_weight) +
                   "; wanted a width from 2 to " + std::to_string(kMostConvWidth));
  }
  const int64_t tokens = call.num_tokens, heads = call.num_value_heads;
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "decay_input", decay_input, kF32, {tokens, heads}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "rate_input", rate_input, kF32, {tokens, heads}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "a_log", a_log, kF32, {heads}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "dt_bias", dt_bias, kF32, {heads}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "conv_state", conv_state, kF32,
                                {call.num_slots, call.conv_width - 1, call.channels()}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "token_rows", token_rows, kS32, {tokens}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "positions", positions, kS32, {tokens}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "state_from", state_from, kS32, {-1}));
  call.num_rows = state_from.dimensions()[0];
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "state_to", state_to, kS32, {call.num_rows}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "state_saves", state_saves, kS32, {tokens}));
  JAXMOE_RETURN_IF_ERROR(expect(kOp, "the result", *out, kF32, {tokens, heads, call.value_dim}));
  if (new_conv_state->untyped_data() != conv_state.untyped_data() ||
      new_delta_state->untyped_data() != delta_state.untyped_data()) {
    return failure(std::string(kOp) +
                   ": a new state has another buffer than the old: alias it to its operand");
  }
  call.qkv = floats(qkv);
  call.decay_input = floats(decay_input);
  call.rate_input = floats(rate_input);
  call.conv_weight = floats(conv_weight);
  call.a_log = floats(a_log);
  call.dt_bias = floats(dt_bias);
  call.conv_state = static_cast<float*>(conv_state.untyped_data());
  call.delta_state = static_cast<float*>(delta_state.untyped_data());
  call.token_rows = ints(token_rows);
  call.positions = ints(positions);
  call.state_from = ints(state_from);
  call.state_to = ints(state_to);
  call.state_saves = ints(state_saves);
  call.out = static_cast<float*>(out->untyped_data());
  return to_error(gated_delta(*runtime->cpu, call));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeGatedDelta, gated_delta_impl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("runtime_id")
                                  .Attr<int64_t>("num_key_heads"));

}  // namespace jaxmoe

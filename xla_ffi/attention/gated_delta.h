// Linear attention by the gated delta rule, with the causal convolution before it, of packed tokens
// over the states of their sequences.
//
// Tokens are taken one after the other, prompts too: a result depends on the sequence alone, never
// on how it was cut into steps or what else is packed in them. Each head's state, [key_dim,
// value_dim] in FP32, is read and written once a step, whatever the number of tokens.
#ifndef JAXMOE_ATTENTION_GATED_DELTA_H_
#define JAXMOE_ATTENTION_GATED_DELTA_H_

#include <cstdint>

#include "runtime/cpu_runtime.h"
#include "runtime/status.h"

namespace jaxmoe {

// All arrays FP32 but for the int32 indices; see ffi/ops.py for what they mean.
struct GatedDeltaCall {
  const float* qkv = nullptr;          // [num_tokens, channels()]
  const float* decay_input = nullptr;  // [num_tokens, num_value_heads]
  const float* rate_input = nullptr;   // [num_tokens, num_value_heads]
  const float* conv_weight = nullptr;  // [conv_width, channels()], oldest token first
  const float* a_log = nullptr;        // [num_value_heads]
  const float* dt_bias = nullptr;      // [num_value_heads]
  int64_t num_tokens = 0;
  int64_t num_key_heads = 0, num_value_heads = 0, key_dim = 0, value_dim = 0;
  int64_t conv_width = 0;
  // Updated in place.
  float* conv_state = nullptr;   // [num_slots, conv_width - 1, channels()]
  float* delta_state = nullptr;  // [num_slots, num_value_heads, key_dim, value_dim]
  int64_t num_slots = 0;
  const int32_t* token_rows = nullptr;   // [num_tokens]; -1: padding, gives zeros
  const int32_t* positions = nullptr;    // [num_tokens]; 0: starts from zeros
  const int32_t* state_from = nullptr;   // [num_rows]
  const int32_t* state_to = nullptr;     // [num_rows]
  const int32_t* state_saves = nullptr;  // [num_tokens]; -1: not kept
  int64_t num_rows = 0;
  float* out = nullptr;  // [num_tokens, num_value_heads, value_dim]

  int64_t key_row() const { return num_key_heads * key_dim; }
  int64_t channels() const { return 2 * key_row() + num_value_heads * value_dim; }
};

Status gated_delta(CpuRuntime& runtime, const GatedDeltaCall& call);

}  // namespace jaxmoe

#endif  // JAXMOE_ATTENTION_GATED_DELTA_H_

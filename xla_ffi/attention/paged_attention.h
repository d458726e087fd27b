// Attention of packed tokens over a paged KV cache, and the write of their keys and values into it.
//
// A result depends on the token's own query and its row's cached positions alone, never on what
// else is packed in the step: the context is always cut into chunks of the same positions, each
// chunk gives a partial softmax state, and the states are merged in order, whether one thread does
// them all or many share them.
#ifndef JAXMOE_ATTENTION_PAGED_ATTENTION_H_
#define JAXMOE_ATTENTION_PAGED_ATTENTION_H_

#include <cstdint>

#include "kernels/kernels.h"
#include "runtime/cpu_runtime.h"
#include "runtime/status.h"

namespace jaxmoe {

// cache: [num_slots, row_elements] (pages and heads flattened); rows: [num_tokens, row_elements].
struct KvWriteCall {
  ActivationType cache_type = ActivationType::kBf16;
  void* cache = nullptr;
  int64_t num_slots = 0;
  ActivationType type = ActivationType::kBf16;
  const void* rows = nullptr;
  int64_t num_tokens = 0;
  int64_t row_elements = 0;
  const int32_t* slots = nullptr;  // [num_tokens]; -1: not written
};

Status kv_write(const KvWriteCall& call);

// kMatrix is the block form, made for the many queries of a prompt: products of matrices, in BF16
// where the CPU has them and queries and cache are BF16 (the softmax weights are then rounded to
// it, as activations of that family are). Like kernels, the two forms round differently, and a
// program has one of them for good.
struct PagedAttentionCall {
  Family family = Family::kVector;
  ActivationType q_type = ActivationType::kBf16;
  const void* q = nullptr;  // [num_tokens, num_heads, head_dim]
  int64_t num_tokens = 0, num_heads = 0, head_dim = 0;
  float scale = 1;
  int64_t window = 0;            // a token sees its last `window` positions; 0: all
  const float* sinks = nullptr;  // [num_heads] scores of a position without a value, or none
  ActivationType cache_type = ActivationType::kBf16;
  const void* keys = nullptr;  // [num_pages, page_size, num_kv_heads, head_dim]
  const void* values =
      nullptr;  // [num_pages, page_size, num_kv_heads, v_dim]; nullptr: the keys' first v_dim
  int64_t num_pages = 0, page_size = 0, num_kv_heads = 0, v_dim = 0;
  const int32_t* token_rows = nullptr;    // [num_tokens]; -1: padding, gives zeros
  const int32_t* positions = nullptr;     // [num_tokens]
  const int32_t* block_tables = nullptr;  // [num_rows, pages_per_row]
  int64_t num_rows = 0, pages_per_row = 0;
  float* out = nullptr;  // [num_tokens, num_heads, v_dim]
};

Status paged_attention(CpuRuntime& runtime, const PagedAttentionCall& call);

}  // namespace jaxmoe

#endif  // JAXMOE_ATTENTION_PAGED_ATTENTION_H_

// Which cached positions a token of sparse attention attends: those of the highest index scores.
//
// A position's score is a sum over the indexer's heads, weight[h] * max(0, q[h] . key), with the
// products of the kernels of linear maps, so that it depends on the token and the position alone,
// never on what else is packed in the step.
#ifndef JAXMOE_ATTENTION_INDEX_SELECT_H_
#define JAXMOE_ATTENTION_INDEX_SELECT_H_

#include <cstdint>

#include "kernels/kernels.h"
#include "runtime/cpu_runtime.h"
#include "runtime/status.h"

namespace jaxmoe {

struct IndexSelectCall {
  Family family = Family::kVector;
  ActivationType q_type = ActivationType::kBf16;
  const void* q = nullptr;              // [num_tokens, num_heads, head_dim]
  const float* head_weights = nullptr;  // [num_tokens, num_heads]
  int64_t num_tokens = 0, num_heads = 0, head_dim = 0;
  ActivationType cache_type = ActivationType::kBf16;
  const void* keys = nullptr;  // [num_pages, page_size, head_dim]
  int64_t num_pages = 0, page_size = 0;
  const int32_t* token_rows = nullptr;    // [num_tokens]; -1: padding, chooses nothing
  const int32_t* positions = nullptr;     // [num_tokens]
  const int32_t* block_tables = nullptr;  // [num_rows, pages_per_row]
  int64_t num_rows = 0, pages_per_row = 0;
  int64_t top_k = 0;
  // [num_tokens, top_k] flat cache slots (page * page_size + offset) in ascending order of their
  // positions, -1 after the last. Of equal scores the lower position is chosen; NaN is the highest,
  // so that it shows in the result.
  int32_t* out = nullptr;
};

Status index_select(CpuRuntime& runtime, const IndexSelectCall& call);

}  // namespace jaxmoe

#endif  // JAXMOE_ATTENTION_INDEX_SELECT_H_

// The arithmetic of paged attention, one table an instruction set. Plain structs only: this header
// is included by files with instruction-set flags (see kernels/isa_tables.h for the rule).
#ifndef JAXMOE_ATTENTION_ATTENTION_KERNELS_H_
#define JAXMOE_ATTENTION_ATTENTION_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace jaxmoe {

// Keys or values of one KV head: element h of position s is data[slot(s) * slot_stride + h].
struct CacheHead {
  const void* data = nullptr;
  ActivationType type = ActivationType::kBf16;
  int64_t slot_stride = 0;  // elements
};

// Softmax state of m queries: running maximum, sum of exponentials, and their weighted sum of
// values.
struct SoftmaxState {
  float* max = nullptr;  // [m]
  float* sum = nullptr;  // [m]
  float* acc = nullptr;  // [m, v_ld]
};

struct ChunkCall {
  const float* q = nullptr;  // [m, q_ld], scaled, zero beyond head_dim
  int64_t m = 0;
  int64_t q_ld = 0;  // padded_dim(head_dim)
  int64_t head_dim = 0, v_dim = 0;
  int64_t v_ld = 0;                  // padded_dim(v_dim)
  const int32_t* visible = nullptr;  // [m]: query i attends positions first[i] to visible[i] - 1
  const int32_t* first = nullptr;    // [m]
  CacheHead keys;
  CacheHead values;                // data == nullptr: the first v_dim elements of the keys
  const int32_t* pages = nullptr;  // page of position s: pages[s / page_size]
  int64_t page_size = 0;
  int64_t begin = 0, end = 0;    // positions of the chunk
  float* key_block = nullptr;    // scratch [kKeyBlock, q_ld]
  float* value_block = nullptr;  // scratch [kKeyBlock, v_ld]
  float* scores = nullptr;       // scratch [m, kKeyBlock]
};

// Positions whose keys are held decoded at once: 32 keys of 576 FP32 elements are 72 KiB, a part of
// any second-level cache. Blocks start at the chunk's first position, so a query sees the same
// blocks in any batch.
inline constexpr int64_t kKeyBlock = 32;

// The block form, for prefill: more queries, a matrix product a block of kBlockKeys positions.
inline constexpr int64_t kBlockKeys = 64;
// Rows of queries that are computed together; q, weights and states have a multiple of it.
inline constexpr int64_t kBlockRows = 16;

struct BlockCall {
  const void* q = nullptr;  // [rows, q_ld], unscaled, zero beyond head_dim and in rows beyond m
  int64_t m = 0;
  int64_t q_ld = 0;  // block_q_ld(head_dim)
  int64_t head_dim = 0, v_dim = 0;
  int64_t v_ld = 0;  // block_v_ld(v_dim)
  float scale = 1;
  const int32_t* visible = nullptr;  // [m], as in ChunkCall
  const int32_t* first = nullptr;    // [m]
  CacheHead keys;
  CacheHead values;
  const int32_t* pages = nullptr;
  int64_t page_size = 0;
  int64_t begin = 0, end = 0;
  // Scratch, 64-byte aligned.
  void* keys_packed = nullptr;    // [q_ld, kBlockKeys] elements
  void* values_packed = nullptr;  // [kBlockKeys, v_ld] elements
  float* scores = nullptr;        // [rows, kBlockKeys]
  void* weights = nullptr;        // [rows, kBlockKeys] elements
  void* weights_alone = nullptr;  // [kBlockRows, kBlockKeys] elements
  float* acc_alone = nullptr;     // [kBlockRows, v_ld]
  float* row = nullptr;           // [q_ld + kBlockRows]
};

struct AttentionKernels {
  const char* name;
  // Row length in floats that vectors can read whole.
  int64_t (*padded_dim)(int64_t dim);
  // Sets `state` to that of the chunk alone.
  void (*attend_chunk)(const ChunkCall& call, const SoftmaxState& state);
  // total = total followed by part.
  void (*merge)(int64_t m, int64_t v_ld, const SoftmaxState& total, const SoftmaxState& part);
  // out[i] = acc / sum, [m rows of v_dim floats at out_rows[i]].
  void (*finish)(int64_t m, int64_t v_dim, int64_t v_ld, const SoftmaxState& state,
                 float* const* out_rows);
  // Sets `state` (whose acc has whole tiles of rows) to that of the chunk alone. Elements are BF16
  // (queries and cache must be) or FP32 (of any).
  void (*attend_block)(const BlockCall& call, const SoftmaxState& state);
  bool block_bf16;
  int64_t (*block_q_ld)(int64_t dim);
  int64_t (*block_v_ld)(int64_t dim);
};

const AttentionKernels& attention_kernels(Isa isa);
// Those whose form for the family takes queries and a cache of these types.
const AttentionKernels& attention_kernels(Isa isa, Family family, ActivationType q_type,
                                          ActivationType cache_type);

namespace attention_isa {
AttentionKernels scalar_kernels();
AttentionKernels avx2_kernels();
AttentionKernels avx512_kernels();
AttentionKernels avx512bf16_kernels();
AttentionKernels amx_kernels();
}  // namespace attention_isa

}  // namespace jaxmoe

#endif  // JAXMOE_ATTENTION_ATTENTION_KERNELS_H_

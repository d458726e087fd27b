#include <cstring>

#include "attention/paged_attention.h"
#include "runtime/bf16.h"

namespace jaxmoe {

// Runs in the caller: a step writes at most a few MB, and a decode step some KB.
Status kv_write(const KvWriteCall& call) {
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    if (call.slots[t] < -1 || call.slots[t] >= call.num_slots) {
      return Status::error("kv_slots[" + std::to_string(t) + "] is " +
                           std::to_string(call.slots[t]) + ", but the cache has slots 0 to " +
                           std::to_string(call.num_slots - 1) + " (-1: none)");
    }
  }
  const int64_t n = call.row_elements;
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    if (call.slots[t] < 0) continue;
    const int64_t to = call.slots[t] * n, from = t * n;
    if (call.cache_type == ActivationType::kBf16) {
      uint16_t* cache = static_cast<uint16_t*>(call.cache) + to;
      if (call.type == ActivationType::kBf16) {
        std::memcpy(cache, static_cast<const uint16_t*>(call.rows) + from,
                    static_cast<size_t>(n) * 2);
      } else {
        round_to_bf16(static_cast<const float*>(call.rows) + from, n, cache);
      }
    } else {
      float* cache = static_cast<float*>(call.cache) + to;
      if (call.type == ActivationType::kF32) {
        std::memcpy(cache, static_cast<const float*>(call.rows) + from, static_cast<size_t>(n) * 4);
      } else {
        widen_bf16(static_cast<const uint16_t*>(call.rows) + from, n, cache);
      }
    }
  }
  return {};
}

}  // namespace jaxmoe

// Paged attention with any rows, positions and block tables: refused, or computed inside the cache.
#include <cmath>
#include <vector>

#include "attention/paged_attention.h"
#include "fuzz_input.h"

using namespace jaxmoe;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::shared_ptr<CpuRuntime> runtime = [] {
    std::shared_ptr<CpuRuntime> made;
    RuntimeOptions options;
    options.num_threads = 1;
    jaxmoe_fuzz::require(CpuRuntime::create(options, &made).ok(), "there is a runtime");
    return made;
  }();
  jaxmoe_fuzz::Input input(data, size);
  PagedAttentionCall call;
  call.q_type = call.cache_type = ActivationType::kF32;
  call.num_kv_heads = input.between(1, 2);
  call.num_heads = call.num_kv_heads * input.between(1, 3);
  call.head_dim = input.between(1, 20);
  const bool separate = input.byte() & 1;
  call.v_dim = separate ? input.between(1, 20) : input.between(1, call.head_dim);
  call.page_size = input.between(1, 5);
  call.num_pages = input.between(1, 6);
  call.num_rows = input.between(1, 3);
  call.pages_per_row = input.between(1, 4);
  call.num_tokens = input.between(0, 5);
  call.window = input.between(0, 9);
  call.scale = 0.5f;
  const auto floats = [&](int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& v : values) v = static_cast<float>(static_cast<int8_t>(input.byte())) / 32;
    return values;
  };
  const auto ints = [&](int64_t count, int64_t end) {
    std::vector<int32_t> values(static_cast<size_t>(count));
    for (int32_t& v : values) v = input.index(end);
    return values;
  };
  const auto tables = ints(call.num_rows * call.pages_per_row, call.num_pages);
  const auto rows = ints(call.num_tokens, call.num_rows);
  const auto positions = ints(call.num_tokens, call.pages_per_row * call.page_size);
  const auto slots = ints(call.num_tokens, call.num_pages * call.page_size);
  const auto q = floats(call.num_tokens * call.num_heads * call.head_dim);
  const int64_t cached = call.num_pages * call.page_size * call.num_kv_heads;
  auto keys = floats(cached * call.head_dim);
  const auto values = floats(separate ? cached * call.v_dim : 0);
  KvWriteCall write;
  write.cache_type = write.type = ActivationType::kF32;
  write.cache = keys.data();
  write.num_slots = call.num_pages * call.page_size;
  write.num_tokens = call.num_tokens;
  write.row_elements = call.num_kv_heads * call.head_dim;
  const auto new_rows = floats(call.num_tokens * write.row_elements);
  write.rows = new_rows.data();
  write.slots = slots.data();
  (void)kv_write(write);
  std::vector<float> out(static_cast<size_t>(call.num_tokens * call.num_heads * call.v_dim));
  call.q = q.data();
  call.keys = keys.data();
  call.values = separate ? values.data() : nullptr;
  call.token_rows = rows.data();
  call.positions = positions.data();
  call.block_tables = tables.data();
  call.out = out.data();
  if (paged_attention(*runtime, call).ok()) {
    for (float v : out) jaxmoe_fuzz::require(std::isfinite(v), "finite inputs give finite sums");
  }
  return 0;
}

#include "attention/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "attention/attention_kernels.h"
#include "runtime/bf16.h"

namespace jaxmoe {
namespace {

// Positions of a chunk, rounded down to whole pages. Merging costs one pass over the output vector
// a chunk, a thousandth of its work; and a context of some thousand tokens gives every thread
// chunks to share.
constexpr int64_t kChunkPositions = 512;
// Query vectors that go through a key block together: its decoding (once a block) is then a few
// percent of the work, and their sums (32 x 512 FP32 for MLA) stay in a second-level cache.
constexpr int64_t kMostQueries = 32;
// In the block form a block's keys and values are also put in the order of the matrix product,
// which costs as much as some ten queries' work on it; and what 128 queries of MLA need (BF16
// queries of 576, FP32 sums of 512) is 400 KiB, half of the smallest second-level cache beside
// AVX-512.
constexpr int64_t kMostBlockQueries = 128;
// Multiply-adds that take about as long as waking a worker.
constexpr int64_t kComputeAlone = 256 << 10;

// Queries that are computed together: consecutive tokens of one row, some heads of one KV head.
struct Group {
  int32_t first_token, num_tokens;
  int32_t kv_head;
  int32_t first_head, num_heads;
  int32_t row;
  int64_t length;       // positions the furthest query sees
  int64_t first_chunk;  // with a window: the first chunk that any query sees
  int64_t first_state;  // with shared chunks: index of its first partial state
};

class AttentionJob final : public Job {
 public:
  AttentionJob(const PagedAttentionCall& call, const AttentionKernels& kernels)
      : Job(Part::kAttention),
        call_(call),
        kernels_(kernels),
        blocks_(call.family == Family::kMatrix),
        most_queries_(blocks_ ? kMostBlockQueries : kMostQueries),
        key_block_(blocks_ ? kBlockKeys : kKeyBlock) {}

  Status check() const;
  Status plan(CpuRuntime& runtime, std::vector<Group>* groups, Scratch* scratch, JobShape* shape);
  bool alone() const { return alone_; }
  void run_unit(int phase, int node, uint32_t unit, int participant) noexcept override;

 private:
  // Of one participant, with offsets into its part of the scratch.
  struct Places {
    size_t q, visible, keys, values, scores, weights, weights_alone, acc_alone, row, states;
  };
  SoftmaxState state_at(float* base) const {
    return {base, base + most_queries_, base + 2 * most_queries_};
  }
  char* participant_scratch(int participant) const {
    return scratch_ + participant_bytes_ * static_cast<size_t>(participant);
  }
  SoftmaxState partial(int64_t index) const { return state_at(partials_ + state_floats_ * index); }
  int64_t first_position(int64_t token) const {
    if (call_.window == 0) return 0;
    return std::max<int64_t>(0, call_.positions[token] + int64_t{1} - call_.window);
  }
  void load_queries(const Group& group, char* scratch) const;
  void attend(const Group& group, int64_t chunk, char* scratch, const SoftmaxState& state) const;
  // `spare` is another state's place.
  void finish(const Group& group, const SoftmaxState& state, const SoftmaxState& spare) const;

  const PagedAttentionCall& call_;
  const AttentionKernels& kernels_;
  const bool blocks_;  // the block form
  const int64_t most_queries_, key_block_;
  const Group* groups_ = nullptr;
  int64_t chunk_ = 0, q_ld_ = 0, v_ld_ = 0;
  bool share_chunks_ = false, alone_ = false;
  // When chunks are shared. Unit -> group (its chunk is unit - first_state); group -> chunks not
  // done.
  const int32_t* unit_group_ = nullptr;
  std::atomic<uint32_t>* chunks_left_ = nullptr;
  int64_t state_floats_ = 0;
  size_t participant_bytes_ = 0;
  Places places_ = {};
  char* scratch_ = nullptr;
  float* partials_ = nullptr;
  uint32_t first_unit_[kMaxNodes] = {};
};

Status AttentionJob::check() const {
  for (int64_t t = 0; t < call_.num_tokens; ++t) {
    const int64_t row = call_.token_rows[t];
    if (row == -1) continue;
    if (row < 0 || row >= call_.num_rows) {
      return Status::error("token_rows[" + std::to_string(t) + "] is " + std::to_string(row) +
                           ", but block_tables has " + std::to_string(call_.num_rows) + " rows");
    }
    const int64_t capacity = call_.pages_per_row * call_.page_size;
    if (call_.positions[t] < 0 || call_.positions[t] >= capacity) {
      return Status::error("positions[" + std::to_string(t) + "] is " +
                           std::to_string(call_.positions[t]) + ", but " +
                           std::to_string(call_.pages_per_row) + " pages of " +
                           std::to_string(call_.page_size) + " tokens hold positions 0 to " +
                           std::to_string(capacity - 1));
    }
    const int64_t pages = call_.positions[t] / call_.page_size + 1;
    const bool next_is_longer = t + 1 < call_.num_tokens && call_.token_rows[t + 1] == row &&
                                call_.positions[t + 1] >= call_.positions[t];
    if (next_is_longer) continue;  // its check covers this one's pages
    const int32_t* table = call_.block_tables + row * call_.pages_per_row;
    for (int64_t p = 0; p < pages; ++p) {
      if (table[p] < 0 || table[p] >= call_.num_pages) {
        return Status::error("block_tables[" + std::to_string(row) + ", " + std::to_string(p) +
                             "] is " + std::to_string(table[p]) + ", which position " +
                             std::to_string(call_.positions[t]) + " of token " + std::to_string(t) +
                             " needs; the cache has pages 0 to " +
                             std::to_string(call_.num_pages - 1));
      }
    }
  }
  return {};
}

Status AttentionJob::plan(CpuRuntime& runtime, std::vector<Group>* groups, Scratch* scratch,
                          JobShape* shape) {
  q_ld_ = blocks_ ? kernels_.block_q_ld(call_.head_dim) : kernels_.padded_dim(call_.head_dim);
  v_ld_ = blocks_ ? kernels_.block_v_ld(call_.v_dim) : kernels_.padded_dim(call_.v_dim);
  chunk_ = std::max<int64_t>(1, kChunkPositions / call_.page_size) * call_.page_size;
  const int64_t per_kv_head = call_.num_heads / call_.num_kv_heads;
  const int64_t most_heads = std::min(per_kv_head, most_queries_);
  const int64_t most_tokens = std::max<int64_t>(1, most_queries_ / per_kv_head);

  groups->clear();
  int64_t chunks = 0, compute = 0, kv_positions = 0;
  for (int64_t t = 0; t < call_.num_tokens;) {
    const int32_t row = call_.token_rows[t];
    if (row == -1) {
      std::memset(call_.out + t * call_.num_heads * call_.v_dim, 0,
                  static_cast<size_t>(call_.num_heads * call_.v_dim) * sizeof(float));
      ++t;
      continue;
    }
    int64_t count = 1;
    int64_t length = call_.positions[t] + int64_t{1};
    int64_t begin = first_position(t);
    while (count < most_tokens && t + count < call_.num_tokens &&
           call_.token_rows[t + count] == row) {
      length = std::max(length, call_.positions[t + count] + int64_t{1});
      begin = std::min(begin, first_position(t + count));
      ++count;
    }
    const int64_t first_chunk = begin / chunk_;
    for (int64_t k = 0; k < call_.num_kv_heads; ++k) {
      for (int64_t h = 0; h < per_kv_head; h += most_heads) {
        const int64_t heads = std::min(most_heads, per_kv_head - h);
        groups->push_back({static_cast<int32_t>(t), static_cast<int32_t>(count),
                           static_cast<int32_t>(k), static_cast<int32_t>(k * per_kv_head + h),
                           static_cast<int32_t>(heads), row, length, first_chunk, chunks});
        chunks += (length + chunk_ - 1) / chunk_ - first_chunk;
        compute += (length - begin) * heads * count * (call_.head_dim + call_.v_dim);
      }
    }
    kv_positions += length - begin;
    t += count;
  }
  const int64_t num_groups = static_cast<int64_t>(groups->size());
  const int threads = runtime.num_threads();
  alone_ = compute <= kComputeAlone;
  // Enough groups for every thread: each group is one unit, chunk after chunk. Few groups with long
  // contexts: their chunks are shared, and merged afterwards in the same order.
  share_chunks_ = !alone_ && threads > 1 && num_groups < 4 * threads && chunks > num_groups;
  const int64_t units = share_chunks_ ? chunks : num_groups;
  if (units > kMaxUnits) {
    return Status::error("attention of " + std::to_string(call_.num_tokens) + " tokens with " +
                         std::to_string(call_.num_kv_heads) +
                         " KV heads is beyond one call: pack fewer");
  }

  state_floats_ =
      static_cast<int64_t>(align_up(static_cast<size_t>(most_queries_ * (2 + v_ld_)), 16));
  const size_t element = blocks_ && kernels_.block_bf16 ? 2 : 4;
  const auto bytes = [](int64_t count, size_t each) { return static_cast<size_t>(count) * each; };
  Layout mine;
  places_.q = mine.add(bytes(most_queries_ * q_ld_, element));
  places_.visible = mine.add(bytes(2 * most_queries_, sizeof(int32_t)));
  places_.keys = mine.add(bytes(key_block_ * q_ld_, element));
  places_.values = mine.add(bytes(key_block_ * v_ld_, element));
  places_.scores = mine.add(bytes(most_queries_ * key_block_, sizeof(float)));
  if (blocks_) {
    places_.weights = mine.add(bytes(most_queries_ * key_block_, element));
    places_.weights_alone = mine.add(bytes(kBlockRows * key_block_, element));
    places_.acc_alone = mine.add(bytes(kBlockRows * v_ld_, sizeof(float)));
    places_.row = mine.add(bytes(q_ld_ + kBlockRows, sizeof(float)));
  }
  places_.states = mine.add(bytes(2 * state_floats_, sizeof(float)));
  participant_bytes_ = align_up(mine.total(), kCacheLine);
  Layout layout;
  const size_t parts = layout.add(participant_bytes_ * static_cast<size_t>(threads));
  const size_t partials =
      layout.add(share_chunks_ ? static_cast<size_t>(state_floats_ * chunks) * sizeof(float) : 0);
  const size_t unit_group =
      layout.add(share_chunks_ ? static_cast<size_t>(chunks) * sizeof(int32_t) : 0);
  const size_t chunks_left = layout.add(
      share_chunks_ ? static_cast<size_t>(num_groups) * sizeof(std::atomic<uint32_t>) : 0);
  if (!scratch->reserve(layout.total())) {
    return Status::error("out of memory for " + std::to_string(layout.total()) +
                         " bytes of attention scratch");
  }
  scratch_ = scratch->data() + parts;
  partials_ = reinterpret_cast<float*>(scratch->data() + partials);
  groups_ = groups->data();
  shape->nodes = runtime.num_nodes();
  shape->phases = 1;
  shape->spread(0, static_cast<uint32_t>(units));
  if (share_chunks_) {
    int32_t* owner = reinterpret_cast<int32_t*>(scratch->data() + unit_group);
    chunks_left_ = reinterpret_cast<std::atomic<uint32_t>*>(scratch->data() + chunks_left);
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t end = g + 1 < num_groups ? groups_[g + 1].first_state : chunks;
      new (chunks_left_ + g)
          std::atomic<uint32_t>(static_cast<uint32_t>(end - groups_[g].first_state));
      for (int64_t c = groups_[g].first_state; c < end; ++c) owner[c] = static_cast<int32_t>(g);
    }
    unit_group_ = owner;
  }
  uint32_t first = 0;
  for (int node = 0; node < shape->nodes; ++node) {
    first_unit_[node] = first;
    first += shape->units[0][node];
  }
  RuntimeStats& stats = runtime.stats();
  stats.attention_calls.fetch_add(1, std::memory_order_relaxed);
  const int64_t elements = call_.head_dim + (call_.values != nullptr ? call_.v_dim : 0);
  stats.attention_kv_bytes.fetch_add(
      static_cast<uint64_t>(kv_positions * call_.num_kv_heads * elements *
                            (call_.cache_type == ActivationType::kF32 ? 4 : 2)),
      std::memory_order_relaxed);
  int64_t seen = 0;  // positions, summed over tokens
  for (int64_t t = 0; t < call_.num_tokens; ++t) {
    if (call_.token_rows[t] != -1) seen += call_.positions[t] + int64_t{1} - first_position(t);
  }
  stats.attention_flops.fetch_add(
      static_cast<uint64_t>(2 * seen * call_.num_heads * (call_.head_dim + call_.v_dim)),
      std::memory_order_relaxed);
  return {};
}

void AttentionJob::load_queries(const Group& group, char* scratch) const {
  const bool halves = blocks_ && kernels_.block_bf16;
  float* q = reinterpret_cast<float*>(scratch + places_.q);
  uint16_t* q_halves = reinterpret_cast<uint16_t*>(scratch + places_.q);
  int32_t* visible = reinterpret_cast<int32_t*>(scratch + places_.visible);
  const auto bytes = [](int64_t count, size_t each) { return static_cast<size_t>(count) * each; };
  int64_t i = 0;
  for (int64_t t = group.first_token; t < group.first_token + group.num_tokens; ++t) {
    for (int64_t n = group.first_head; n < group.first_head + group.num_heads; ++n, ++i) {
      const int64_t from = (t * call_.num_heads + n) * call_.head_dim;
      visible[i] = call_.positions[t] + 1;
      visible[most_queries_ + i] = static_cast<int32_t>(first_position(t));
      if (halves) {
        uint16_t* to = q_halves + i * q_ld_;
        std::memcpy(to, static_cast<const uint16_t*>(call_.q) + from, bytes(call_.head_dim, 2));
        std::memset(to + call_.head_dim, 0, bytes(q_ld_ - call_.head_dim, 2));
        continue;
      }
      float* to = q + i * q_ld_;
      if (call_.q_type == ActivationType::kF32) {
        std::memcpy(to, static_cast<const float*>(call_.q) + from, bytes(call_.head_dim, 4));
      } else {
        widen_bf16(static_cast<const uint16_t*>(call_.q) + from, call_.head_dim, to);
      }
      if (!blocks_) {  // there the scores are scaled, as BF16 queries could not be
        for (int64_t h = 0; h < call_.head_dim; ++h) to[h] *= call_.scale;
      }
      for (int64_t h = call_.head_dim; h < q_ld_; ++h) to[h] = 0;
    }
  }
  if (blocks_) {  // rows that complete the last tile
    const int64_t rows = (i + kBlockRows - 1) / kBlockRows * kBlockRows;
    const size_t row_bytes = bytes(q_ld_, halves ? 2 : 4);
    std::memset(scratch + places_.q + row_bytes * static_cast<size_t>(i), 0,
                row_bytes * static_cast<size_t>(rows - i));
  }
}

void AttentionJob::attend(const Group& group, int64_t chunk, char* scratch,
                          const SoftmaxState& state) const {
  const int64_t m = group.num_tokens * group.num_heads;
  const int32_t* visible = reinterpret_cast<int32_t*>(scratch + places_.visible);
  const int32_t* first = visible + most_queries_;
  const int64_t element = call_.cache_type == ActivationType::kF32 ? 4 : 2;
  const CacheHead keys{
      static_cast<const char*>(call_.keys) + group.kv_head * call_.head_dim * element,
      call_.cache_type, call_.num_kv_heads * call_.head_dim};
  CacheHead values;
  if (call_.values != nullptr) {
    values = {static_cast<const char*>(call_.values) + group.kv_head * call_.v_dim * element,
              call_.cache_type, call_.num_kv_heads * call_.v_dim};
  }
  int64_t begin = chunk * chunk_;
  const int64_t end = std::min(group.length, begin + chunk_);
  // Whole blocks that no query sees are not read; those left are the same as in any batch.
  const int32_t least = *std::min_element(first, first + m);
  if (least > begin) begin += (least - begin) / key_block_ * key_block_;

  const auto fill = [&](auto* c) {
    c->m = m;
    c->q_ld = q_ld_;
    c->head_dim = call_.head_dim;
    c->v_dim = call_.v_dim;
    c->v_ld = v_ld_;
    c->visible = visible;
    c->first = first;
    c->keys = keys;
    c->values = values;
    c->pages = call_.block_tables + group.row * call_.pages_per_row;
    c->page_size = call_.page_size;
    c->begin = begin;
    c->end = end;
    c->scores = reinterpret_cast<float*>(scratch + places_.scores);
  };
  if (blocks_) {
    BlockCall c;
    fill(&c);
    c.q = scratch + places_.q;
    c.scale = call_.scale;
    c.keys_packed = scratch + places_.keys;
    c.values_packed = scratch + places_.values;
    c.weights = scratch + places_.weights;
    c.weights_alone = scratch + places_.weights_alone;
    c.acc_alone = reinterpret_cast<float*>(scratch + places_.acc_alone);
    c.row = reinterpret_cast<float*>(scratch + places_.row);
    kernels_.attend_block(c, state);
  } else {
    ChunkCall c;
    fill(&c);
    c.q = reinterpret_cast<float*>(scratch + places_.q);
    c.key_block = reinterpret_cast<float*>(scratch + places_.keys);
    c.value_block = reinterpret_cast<float*>(scratch + places_.values);
    kernels_.attend_chunk(c, state);
  }
}

void AttentionJob::finish(const Group& group, const SoftmaxState& state,
                          const SoftmaxState& spare) const {
  if (call_.sinks != nullptr) {
    // A sink is one more position, which weighs in the sum and has no value.
    const int64_t m = group.num_tokens * group.num_heads;
    for (int64_t i = 0; i < m; ++i) {
      spare.max[i] = call_.sinks[group.first_head + i % group.num_heads];
      spare.sum[i] = 1.0f;
    }
    std::memset(spare.acc, 0, static_cast<size_t>(m * v_ld_) * sizeof(float));
    kernels_.merge(m, v_ld_, state, spare);
  }
  float* rows[kMostBlockQueries];
  int64_t i = 0;
  for (int64_t t = group.first_token; t < group.first_token + group.num_tokens; ++t) {
    for (int64_t n = group.first_head; n < group.first_head + group.num_heads; ++n) {
      rows[i++] = call_.out + (t * call_.num_heads + n) * call_.v_dim;
    }
  }
  kernels_.finish(i, call_.v_dim, v_ld_, state, rows);
}

void AttentionJob::run_unit(int, int node, uint32_t unit, int participant) noexcept {
  unit += first_unit_[node];
  char* scratch = participant_scratch(participant);
  float* states = reinterpret_cast<float*>(scratch + places_.states);
  const SoftmaxState total = state_at(states), part = state_at(states + state_floats_);
  if (share_chunks_) {
    const int32_t g = unit_group_[unit];
    const Group& group = groups_[g];
    load_queries(group, scratch);
    attend(group, group.first_chunk + unit - group.first_state, scratch, partial(unit));
    // Whoever ends the group's last chunk merges them, first to last.
    if (chunks_left_[g].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      const SoftmaxState first = partial(group.first_state);
      for (int64_t i = 1; (group.first_chunk + i) * chunk_ < group.length; ++i) {
        kernels_.merge(group.num_tokens * group.num_heads, v_ld_, first,
                       partial(group.first_state + i));
      }
      finish(group, first, part);
    }
    return;
  }
  const Group& group = groups_[unit];
  load_queries(group, scratch);
  attend(group, group.first_chunk, scratch, total);
  for (int64_t chunk = group.first_chunk + 1; chunk * chunk_ < group.length; ++chunk) {
    attend(group, chunk, scratch, part);
    kernels_.merge(group.num_tokens * group.num_heads, v_ld_, total, part);
  }
  finish(group, total, part);
}

}  // namespace

const AttentionKernels& attention_kernels(Isa isa) {
  static const AttentionKernels tables[kNumIsas] = {
      attention_isa::scalar_kernels(), attention_isa::avx2_kernels(),
      attention_isa::avx512_kernels(), attention_isa::avx512bf16_kernels(),
      attention_isa::amx_kernels()};
  return tables[static_cast<int>(isa)];
}

const AttentionKernels& attention_kernels(Isa isa, Family family, ActivationType q_type,
                                          ActivationType cache_type) {
  // BF16 products are exact for BF16 operands alone.
  const bool halves = q_type == ActivationType::kBf16 && cache_type == ActivationType::kBf16;
  if (family == Family::kMatrix && attention_kernels(isa).block_bf16) {
    // Nor are they of use where vdpbf16ps is slower than two FP32 FMAs, which shows in what the
    // kernels of decode are made of.
    const MatmulKernel& decode = select_kernel(kernel_table(isa), Family::kVector,
                                               WeightFormat::kFp8Block, ActivationType::kBf16);
    const bool slow = isa == Isa::kAvx512Bf16 && decode.isa != Isa::kAvx512Bf16;
    if (!halves || slow) isa = Isa::kAvx512;
  }
  return attention_kernels(isa);
}

Status paged_attention(CpuRuntime& runtime, const PagedAttentionCall& call) {
  if (call.num_tokens == 0) return {};
  const OperationScope scope(runtime.tracer(), Part::kAttention, call.num_tokens);
  AttentionJob job(call,
                   attention_kernels(runtime.isa(), call.family, call.q_type, call.cache_type));
  Status status = job.check();
  if (!status.ok()) return status;
  // Kept per thread: no allocation after the largest step.
  thread_local std::vector<Group> groups;
  JobShape shape;
  Pool& pool = runtime.pool();
  JobSlot* slot = pool.acquire();
  status = job.plan(runtime, &groups, &slot->scratch, &shape);
  if (status.ok() && shape.total() > 0) {
    if (job.alone()) {
      pool.run_alone(&job, shape);
    } else {
      pool.run(slot, &job, shape);
    }
  }
  pool.release(slot);
  return status;
}

}  // namespace jaxmoe

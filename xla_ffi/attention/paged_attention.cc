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
      : call_(call), kernels_(kernels) {}

  Status check() const;
  Status plan(CpuRuntime& runtime, std::vector<Group>* groups, Scratch* scratch, JobShape* shape);
  bool alone() const { return alone_; }
  void run_unit(int phase, int node, uint32_t unit, int participant) noexcept override;

 private:
  SoftmaxState state_at(float* base) const {
    return {base, base + kMostQueries, base + 2 * kMostQueries};
  }
  float* participant_scratch(int participant) const {
    return scratch_ + participant_floats_ * participant;
  }
  SoftmaxState partial(int64_t index) const { return state_at(partials_ + state_floats_ * index); }
  int64_t first_position(int64_t token) const {
    if (call_.window == 0) return 0;
    return std::max<int64_t>(0, call_.positions[token] + int64_t{1} - call_.window);
  }
  void load_queries(const Group& group, float* q, int32_t* visible) const;
  void attend(const Group& group, int64_t chunk, float* scratch, const SoftmaxState& state) const;
  // `spare` is another state's place.
  void finish(const Group& group, const SoftmaxState& state, const SoftmaxState& spare) const;

  const PagedAttentionCall& call_;
  const AttentionKernels& kernels_;
  const Group* groups_ = nullptr;
  int64_t chunk_ = 0, q_ld_ = 0, v_ld_ = 0;
  bool share_chunks_ = false, alone_ = false;
  // When chunks are shared. Unit -> group (its chunk is unit - first_state); group -> chunks not
  // done.
  const int32_t* unit_group_ = nullptr;
  std::atomic<uint32_t>* chunks_left_ = nullptr;
  int64_t state_floats_ = 0, participant_floats_ = 0;
  float* scratch_ = nullptr;
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
  q_ld_ = kernels_.padded_dim(call_.head_dim);
  v_ld_ = kernels_.padded_dim(call_.v_dim);
  chunk_ = std::max<int64_t>(1, kChunkPositions / call_.page_size) * call_.page_size;
  const int64_t per_kv_head = call_.num_heads / call_.num_kv_heads;
  const int64_t most_heads = std::min(per_kv_head, kMostQueries);
  const int64_t most_tokens = std::max<int64_t>(1, kMostQueries / per_kv_head);

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
      static_cast<int64_t>(align_up(static_cast<size_t>(kMostQueries * (2 + v_ld_)), 16));
  // Queries, what each sees (to, from), key block, value block, scores, two states.
  participant_floats_ = kMostQueries * q_ld_ + 2 * kMostQueries + kKeyBlock * (q_ld_ + v_ld_) +
                        kMostQueries * kKeyBlock + 2 * state_floats_;
  participant_floats_ =
      static_cast<int64_t>(align_up(static_cast<size_t>(participant_floats_), 16));
  Layout layout;
  const size_t parts =
      layout.add(static_cast<size_t>(participant_floats_ * threads) * sizeof(float));
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
  scratch_ = reinterpret_cast<float*>(scratch->data() + parts);
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

void AttentionJob::load_queries(const Group& group, float* q, int32_t* visible) const {
  int64_t i = 0;
  for (int64_t t = group.first_token; t < group.first_token + group.num_tokens; ++t) {
    for (int64_t n = group.first_head; n < group.first_head + group.num_heads; ++n, ++i) {
      float* to = q + i * q_ld_;
      const int64_t from = (t * call_.num_heads + n) * call_.head_dim;
      if (call_.q_type == ActivationType::kF32) {
        std::memcpy(to, static_cast<const float*>(call_.q) + from,
                    static_cast<size_t>(call_.head_dim) * sizeof(float));
      } else {
        widen_bf16(static_cast<const uint16_t*>(call_.q) + from, call_.head_dim, to);
      }
      for (int64_t h = 0; h < call_.head_dim; ++h) to[h] *= call_.scale;
      for (int64_t h = call_.head_dim; h < q_ld_; ++h) to[h] = 0;
      visible[i] = call_.positions[t] + 1;
      visible[kMostQueries + i] = static_cast<int32_t>(first_position(t));
    }
  }
}

void AttentionJob::attend(const Group& group, int64_t chunk, float* scratch,
                          const SoftmaxState& state) const {
  ChunkCall chunk_call;
  chunk_call.q = scratch;
  chunk_call.m = group.num_tokens * group.num_heads;
  chunk_call.q_ld = q_ld_;
  chunk_call.head_dim = call_.head_dim;
  chunk_call.v_dim = call_.v_dim;
  chunk_call.v_ld = v_ld_;
  chunk_call.visible = reinterpret_cast<int32_t*>(scratch + kMostQueries * q_ld_);
  chunk_call.first = chunk_call.visible + kMostQueries;
  chunk_call.key_block = scratch + kMostQueries * q_ld_ + 2 * kMostQueries;
  chunk_call.value_block = chunk_call.key_block + kKeyBlock * q_ld_;
  chunk_call.scores = chunk_call.value_block + kKeyBlock * v_ld_;
  const int64_t element = call_.cache_type == ActivationType::kF32 ? 4 : 2;
  chunk_call.keys = {
      static_cast<const char*>(call_.keys) + group.kv_head * call_.head_dim * element,
      call_.cache_type, call_.num_kv_heads * call_.head_dim};
  if (call_.values != nullptr) {
    chunk_call.values = {
        static_cast<const char*>(call_.values) + group.kv_head * call_.v_dim * element,
        call_.cache_type, call_.num_kv_heads * call_.v_dim};
  }
  chunk_call.pages = call_.block_tables + group.row * call_.pages_per_row;
  chunk_call.page_size = call_.page_size;
  chunk_call.begin = chunk * chunk_;
  chunk_call.end = std::min(group.length, chunk_call.begin + chunk_);
  // Whole blocks that no query sees are not read; those left are the same as in any batch.
  int32_t begin = chunk_call.first[0];
  for (int64_t i = 1; i < chunk_call.m; ++i) begin = std::min(begin, chunk_call.first[i]);
  if (begin > chunk_call.begin) {
    chunk_call.begin += (begin - chunk_call.begin) / kKeyBlock * kKeyBlock;
  }
  kernels_.attend_chunk(chunk_call, state);
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
  float* rows[kMostQueries];
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
  float* scratch = participant_scratch(participant);
  int32_t* visible = reinterpret_cast<int32_t*>(scratch + kMostQueries * q_ld_);
  float* states = scratch + participant_floats_ - 2 * state_floats_;
  const SoftmaxState total = state_at(states), part = state_at(states + state_floats_);
  if (share_chunks_) {
    const int32_t g = unit_group_[unit];
    const Group& group = groups_[g];
    load_queries(group, scratch, visible);
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
  load_queries(group, scratch, visible);
  attend(group, group.first_chunk, scratch, total);
  for (int64_t chunk = group.first_chunk + 1; chunk * chunk_ < group.length; ++chunk) {
    attend(group, chunk, scratch, part);
    kernels_.merge(group.num_tokens * group.num_heads, v_ld_, total, part);
  }
  finish(group, total, part);
}

}  // namespace

const AttentionKernels& attention_kernels(Isa isa) {
  static const AttentionKernels scalar = attention_isa::scalar_kernels();
  static const AttentionKernels avx2 = attention_isa::avx2_kernels();
  static const AttentionKernels avx512 = attention_isa::avx512_kernels();
  switch (isa) {
    case Isa::kScalar:
      return scalar;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
      return avx512;
  }
  return scalar;
}

Status paged_attention(CpuRuntime& runtime, const PagedAttentionCall& call) {
  if (call.num_tokens == 0) return {};
  AttentionJob job(call, attention_kernels(runtime.isa()));
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

#include "attention/index_select.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <new>
#include <vector>

#include "runtime/scratch.h"

namespace jaxmoe {
namespace {

// Tokens of one row whose queries meet a page of keys together. With 64 heads 256 rows of queries:
// their panel (64 KiB at 128 BF16 elements) stays in a second-level cache while the keys pass by.
constexpr int64_t kGroupTokens = 4;
// Positions of a unit: 64 heads take some 100 us for one token, and contexts beyond a few thousand
// positions give every thread units to share.
constexpr int64_t kUnitPositions = 1024;
// Scores held at once. Tokens of a longer prompt are taken in as many jobs as that makes.
constexpr int64_t kMostScoreBytes = 64 << 20;
// Multiply-adds that take about as long as waking a worker.
constexpr int64_t kComputeAlone = 128 << 10;

// Consecutive tokens of one row that see more than top_k positions.
struct Group {
  int64_t first_token, num_tokens;
  int64_t length;       // positions the furthest token sees
  int64_t first_score;  // of token t of the group: first_score + t * length
  int64_t first_unit;
};

// Orders floats as unsigned integers, NaN above all.
uint32_t rank_of(float score) {
  if (std::isnan(score)) return 0xffffffffu;
  const uint32_t bits = std::bit_cast<uint32_t>(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

class SelectJob final : public Job {
 public:
  SelectJob(const IndexSelectCall& call, const MatmulKernel& kernel)
      : Job(Part::kAttention), call_(call), kernel_(kernel) {}

  Status plan(CpuRuntime& runtime, const std::vector<Group>& groups, Scratch* scratch,
              JobShape* shape) {
    const auto floats = [](int64_t count) { return static_cast<size_t>(count) * sizeof(float); };
    const int64_t rows = kGroupTokens * call_.num_heads;
    unit_pages_ = std::max<int64_t>(1, kUnitPositions / call_.page_size);
    groups_ = groups.data();
    int64_t longest = 0, units = 0, compute = 0;
    for (const Group& group : groups) {
      longest = std::max(longest, group.length);
      units += units_of(group);
      compute += group.length * group.num_tokens * call_.num_heads * call_.head_dim;
    }
    if (units > kMaxUnits) return Status::error("a context is too long for pages this small");
    alone_ = compute <= kComputeAlone;

    row_bytes_ = kernel_.prepared_row_bytes(call_.head_dim);
    Layout mine;
    prepared_ = mine.add(row_bytes_ * static_cast<size_t>(rows));
    panel_ = kernel_.panel_bytes == nullptr ? prepared_
                                            : mine.add(kernel_.panel_bytes(rows, call_.head_dim));
    row_ids_ = mine.add(static_cast<size_t>(rows) * sizeof(int32_t));
    products_ = mine.add(floats(rows * call_.page_size));
    ranks_ = mine.add(floats(longest));
    participant_bytes_ = align_up(mine.total(), kCacheLine);
    Layout layout;
    const Group& last = groups.back();
    const size_t parts =
        layout.add(participant_bytes_ * static_cast<size_t>(runtime.num_threads()));
    const size_t scores = layout.add(floats(last.first_score + last.num_tokens * last.length));
    const size_t owners = layout.add(static_cast<size_t>(units) * sizeof(int32_t));
    const size_t left = layout.add(groups.size() * sizeof(std::atomic<uint32_t>));
    if (!scratch->reserve(layout.total())) {
      return Status::error("out of memory for " + std::to_string(layout.total()) +
                           " bytes of index scores");
    }
    parts_ = scratch->data() + parts;
    scores_ = reinterpret_cast<float*>(scratch->data() + scores);
    int32_t* owner = reinterpret_cast<int32_t*>(scratch->data() + owners);
    left_ = reinterpret_cast<std::atomic<uint32_t>*>(scratch->data() + left);
    for (size_t g = 0; g < groups.size(); ++g) {
      const int64_t count = units_of(groups[g]);
      new (left_ + g) std::atomic<uint32_t>(static_cast<uint32_t>(count));
      std::fill_n(owner + groups[g].first_unit, count, static_cast<int32_t>(g));
    }
    owner_ = owner;

    shape->nodes = runtime.num_nodes();
    shape->phases = 1;
    shape->spread(0, static_cast<uint32_t>(units));
    uint32_t first = 0;
    for (int node = 0; node < shape->nodes; ++node) {
      first_unit_[node] = first;
      first += shape->units[0][node];
    }
    RuntimeStats& stats = runtime.stats();
    stats.attention_flops.fetch_add(static_cast<uint64_t>(2 * compute), std::memory_order_relaxed);
    const int64_t element = call_.cache_type == ActivationType::kF32 ? 4 : 2;
    uint64_t key_bytes = 0;
    for (const Group& group : groups) {
      key_bytes += static_cast<uint64_t>(group.length * call_.head_dim * element);
    }
    stats.attention_kv_bytes.fetch_add(key_bytes, std::memory_order_relaxed);
    return {};
  }

  bool alone() const { return alone_; }
  int64_t units_of(const Group& group) const {
    const int64_t pages = (group.length + call_.page_size - 1) / call_.page_size;
    const int64_t unit_pages = std::max<int64_t>(1, kUnitPositions / call_.page_size);
    return (pages + unit_pages - 1) / unit_pages;
  }

  void run_unit(int, int node, uint32_t unit, int participant) noexcept override {
    unit += first_unit_[node];
    const int32_t g = owner_[unit];
    const Group& group = groups_[g];
    char* scratch = parts_ + participant_bytes_ * static_cast<size_t>(participant);
    score(group, unit - group.first_unit, scratch);
    // Whoever scores a group's last positions chooses among all of them.
    if (left_[g].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    for (int64_t i = 0; i < group.num_tokens; ++i) choose(group, i, scratch);
  }

 private:
  const int32_t* table_of(int64_t token) const {
    return call_.block_tables + call_.token_rows[token] * call_.pages_per_row;
  }

  void score(const Group& group, int64_t unit, char* scratch) const {
    const int64_t heads = call_.num_heads, rows = group.num_tokens * heads;
    const int64_t q_element = call_.q_type == ActivationType::kF32 ? 4 : 2;
    const int64_t element = call_.cache_type == ActivationType::kF32 ? 4 : 2;
    const char* q =
        static_cast<const char*>(call_.q) + group.first_token * heads * call_.head_dim * q_element;
    kernel_.prepare(call_.q_type, q, call_.head_dim, call_.head_dim, 0, rows, scratch + prepared_);
    if (kernel_.panel_bytes != nullptr) {
      int32_t* row_ids = reinterpret_cast<int32_t*>(scratch + row_ids_);
      for (int64_t i = 0; i < rows; ++i) row_ids[i] = static_cast<int32_t>(i);
      kernel_.make_panel(scratch + prepared_, call_.head_dim, row_ids, rows, scratch + panel_);
    }
    WeightView keys;
    keys.k = call_.head_dim;
    keys.row_stride_bytes = call_.head_dim * element;
    keys.format =
        call_.cache_type == ActivationType::kF32 ? WeightFormat::kF32 : WeightFormat::kBf16;
    float* products = reinterpret_cast<float*>(scratch + products_);
    const int32_t* table = table_of(group.first_token);
    const int64_t size = call_.page_size;
    const int64_t first_page = unit * unit_pages_;
    const int64_t end_page = std::min(first_page + unit_pages_, (group.length + size - 1) / size);
    for (int64_t page = first_page; page < end_page; ++page) {
      keys.n = std::min(size, group.length - page * size);
      keys.data =
          static_cast<const uint8_t*>(call_.keys) + table[page] * size * keys.row_stride_bytes;
      kernel_.matmul(keys, 0, keys.n, scratch + panel_, nullptr, rows, products, size);
      for (int64_t i = 0; i < group.num_tokens; ++i) {
        const float* weights = call_.head_weights + (group.first_token + i) * heads;
        float* to = scores_ + group.first_score + i * group.length + page * size;
        std::memset(to, 0, static_cast<size_t>(keys.n) * sizeof(float));
        for (int64_t h = 0; h < heads; ++h) {
          const float weight = weights[h];
          const float* row = products + (i * heads + h) * size;
          // Written so that NaN passes.
          for (int64_t n = 0; n < keys.n; ++n) to[n] += weight * (row[n] < 0.0f ? 0.0f : row[n]);
        }
      }
    }
  }

  void choose(const Group& group, int64_t i, char* scratch) const {
    const int64_t token = group.first_token + i;
    const int64_t seen = call_.positions[token] + int64_t{1};
    const float* scores = scores_ + group.first_score + i * group.length;
    uint32_t* ranks = reinterpret_cast<uint32_t*>(scratch + ranks_);
    for (int64_t s = 0; s < seen; ++s) ranks[s] = rank_of(scores[s]);
    uint32_t* last = ranks + call_.top_k - 1;
    std::nth_element(ranks, last, ranks + seen, std::greater<uint32_t>());
    const uint32_t least = *last;
    // Of those that equal the last chosen one, as many as are missing.
    int64_t equals =
        call_.top_k - std::count_if(ranks, last, [&](uint32_t r) { return r > least; });
    const int32_t* table = table_of(token);
    const int64_t size = call_.page_size;
    int32_t* out = call_.out + token * call_.top_k;
    for (int64_t s = 0; s < seen; ++s) {
      const uint32_t rank = rank_of(scores[s]);
      if (rank < least || (rank == least && equals-- <= 0)) continue;
      *out++ = static_cast<int32_t>(table[s / size] * size + s % size);
    }
  }

  const IndexSelectCall& call_;
  const MatmulKernel& kernel_;
  const Group* groups_ = nullptr;
  const int32_t* owner_ = nullptr;  // unit -> group
  std::atomic<uint32_t>* left_ = nullptr;
  float* scores_ = nullptr;
  char* parts_ = nullptr;
  size_t participant_bytes_ = 0, row_bytes_ = 0;
  size_t prepared_ = 0, panel_ = 0, row_ids_ = 0, products_ = 0, ranks_ = 0;
  int64_t unit_pages_ = 1;
  bool alone_ = false;
  uint32_t first_unit_[kMaxNodes] = {};
};

Status check(const IndexSelectCall& call) {
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    const int64_t row = call.token_rows[t], position = call.positions[t];
    if (row == -1) continue;
    if (row < 0 || row >= call.num_rows || position < 0 ||
        position >= call.pages_per_row * call.page_size) {
      return Status::error("token " + std::to_string(t) + " is at position " +
                           std::to_string(position) + " of row " + std::to_string(row) +
                           ", but block_tables has " + std::to_string(call.num_rows) + " rows of " +
                           std::to_string(call.pages_per_row) + " pages of " +
                           std::to_string(call.page_size));
    }
    if (t + 1 < call.num_tokens && call.token_rows[t + 1] == row &&
        call.positions[t + 1] >= position) {
      continue;  // its check covers this one's pages
    }
    const int32_t* table = call.block_tables + row * call.pages_per_row;
    for (int64_t p = 0; p <= position / call.page_size; ++p) {
      if (table[p] < 0 || table[p] >= call.num_pages) {
        return Status::error("block_tables[" + std::to_string(row) + ", " + std::to_string(p) +
                             "] is " + std::to_string(table[p]) +
                             ", but the cache has pages 0 to " +
                             std::to_string(call.num_pages - 1));
      }
    }
  }
  return {};
}

// The slots of all positions a token sees, where they are no more than top_k; -1 after them.
void fill_all(const IndexSelectCall& call, int64_t token, int64_t seen) {
  int32_t* out = call.out + token * call.top_k;
  const int32_t* table = call.block_tables + call.token_rows[token] * call.pages_per_row;
  for (int64_t s = 0; s < seen; ++s) {
    out[s] = static_cast<int32_t>(table[s / call.page_size] * call.page_size + s % call.page_size);
  }
  std::fill(out + seen, out + call.top_k, -1);
}

}  // namespace

Status index_select(CpuRuntime& runtime, const IndexSelectCall& call) {
  if (call.num_tokens == 0) return {};
  const OperationScope scope(runtime.tracer(), Part::kAttention, call.num_tokens);
  Status status = check(call);
  if (!status.ok()) return status;
  const MatmulKernel& kernel = runtime.kernel(
      call.family,
      call.cache_type == ActivationType::kF32 ? WeightFormat::kF32 : WeightFormat::kBf16,
      call.q_type);
  // Kept per thread: no allocation after the largest step.
  thread_local std::vector<Group> groups;
  SelectJob sizes(call, kernel);
  Pool& pool = runtime.pool();
  JobSlot* slot = pool.acquire();
  for (int64_t t = 0; t < call.num_tokens && status.ok();) {
    groups.clear();
    int64_t scores = 0, units = 0;
    for (; t < call.num_tokens; ++t) {
      const int32_t row = call.token_rows[t];
      const int64_t seen = row == -1 ? 0 : call.positions[t] + int64_t{1};
      if (seen <= call.top_k) {
        fill_all(call, t, seen);
        continue;
      }
      if (!groups.empty() && (scores + seen) * int64_t{sizeof(float)} > kMostScoreBytes) break;
      Group* last = groups.empty() ? nullptr : &groups.back();
      if (last != nullptr && last->num_tokens < kGroupTokens &&
          last->first_token + last->num_tokens == t && call.token_rows[t - 1] == row) {
        const int64_t count = last->num_tokens + 1, length = std::max(last->length, seen);
        units -= sizes.units_of(*last);
        last->num_tokens = count;
        last->length = length;
        scores = last->first_score + count * length;
        units += sizes.units_of(*last);
      } else {
        groups.push_back({t, 1, seen, scores, units});
        scores += seen;
        units += sizes.units_of(groups.back());
      }
    }
    if (groups.empty()) break;
    SelectJob job(call, kernel);
    JobShape shape;
    status = job.plan(runtime, groups, &slot->scratch, &shape);
    if (!status.ok()) break;
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

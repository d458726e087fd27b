#include "moe/linear.h"

#include <algorithm>
#include <atomic>

#include "moe/tiling.h"
#include "runtime/bf16.h"
#include "runtime/futex.h"

namespace jaxmoe {
namespace {

// Rows of one panel: a panel of k = 7168 BF16 columns (1.8 MB) then stays in a core's second-level
// cache while the rows of a unit pass by.
constexpr int64_t kPanelRows = 128;
// Elements whose conversion takes about as long as opening a job to the pool (some us): below, the
// caller converts them itself before it opens the job.
constexpr int64_t kConvertAlone = 32 << 10;
// Multiply-adds that take about as long as waking a worker: below, nothing is shared.
constexpr int64_t kComputeAlone = 128 << 10;
// Rows of the widest register tile any kernel has.
constexpr int64_t kRowStep = 16;

class LinearJob final : public Job {
 public:
  LinearJob(const LinearCall& call, const MatmulKernel& kernel, Tracer& tracer)
      : Job(Part::kLinear), call_(call), kernel_(kernel), tracer_(tracer) {}

  Status plan(CpuRuntime& runtime, Scratch* scratch, JobShape* shape) {
    const WeightView& w = call_.weight;
    const bool panels = kernel_.panel_bytes != nullptr;
    chunk_rows_ = panels ? std::min(kPanelRows, call_.m)
                         : std::clamp<int64_t>(kConvertAlone / 2 / w.k, 1, call_.m);
    chunks_ = (call_.m + chunk_rows_ - 1) / chunk_rows_;
    row_bytes_ = kernel_.prepared_row_bytes(w.k);
    panel_bytes_ = panels ? align_up(kernel_.panel_bytes(chunk_rows_, w.k), kCacheLine) : 0;
    const int64_t chunks = call_.groups * chunks_;
    chunks_per_unit_ = std::max<int64_t>(1, kConvertAlone / 2 / (chunk_rows_ * w.k));

    const int64_t weight_row_bytes = w.row_stride_bytes;
    block_rows_ = rows_per_unit(w.n * call_.groups, weight_row_bytes, runtime.num_threads(),
                                kRowStep, call_.m <= runtime.few_tokens());
    block_rows_ = std::min(block_rows_, (w.n + kRowStep - 1) / kRowStep * kRowStep);
    blocks_ = (w.n + block_rows_ - 1) / block_rows_;
    if (call_.groups * blocks_ > kMaxUnits || chunks > kMaxUnits) {
      return Status::error("a linear map of " + std::to_string(call_.groups) + " x [" +
                           std::to_string(w.n) + ", " + std::to_string(w.k) + "] with " +
                           std::to_string(call_.m) + " rows is beyond what one call can do");
    }

    Layout layout;
    prepared_offset_ = layout.add(row_bytes_ * static_cast<size_t>(call_.m * call_.groups));
    panels_offset_ = layout.add(panel_bytes_ * static_cast<size_t>(chunks));
    tile_floats_ = call_.y_type == ActivationType::kBf16
                       ? align_up(static_cast<size_t>(call_.m * block_rows_), 16)
                       : 0;
    tiles_offset_ = layout.add(tile_floats_ * sizeof(float) * runtime.num_threads());
    if (!scratch->reserve(layout.total())) {
      return Status::error("out of memory for " + std::to_string(layout.total()) +
                           " bytes of a linear map's activations");
    }
    base_ = scratch->data();

    shape->nodes = runtime.num_nodes();
    shape->phases = 2;
    const uint32_t prepare_units =
        static_cast<uint32_t>((chunks + chunks_per_unit_ - 1) / chunks_per_unit_);
    prepare_left_.store(prepare_units, std::memory_order_relaxed);
    if (call_.m * call_.groups * w.k <= kConvertAlone) {
      for (uint32_t unit = 0; unit < prepare_units; ++unit) prepare_unit(unit);
    } else {
      shape->spread(0, prepare_units);
    }
    // JAX owns this memory and does not place it by node: the units are spread evenly.
    shape->spread(1, static_cast<uint32_t>(call_.groups * blocks_));
    for (int phase = 0; phase < 2; ++phase) {
      uint32_t first = 0;
      for (int node = 0; node < shape->nodes; ++node) {
        first_unit_[phase][node] = first;
        first += shape->units[phase][node];
      }
    }
    alone_ = call_.groups * w.n * w.k * std::max<int64_t>(1, call_.m / 2) <= kComputeAlone;
    return {};
  }

  bool alone() const { return alone_; }

  void run_unit(int phase, int node, uint32_t unit, int participant) noexcept override {
    unit += first_unit_[phase][node];
    if (phase == 0) {
      prepare_unit(unit);
    } else {
      tracer_.wait(part(), [this] { return prepare_left_.load(std::memory_order_acquire) == 0; });
      matmul_unit(unit, participant);
    }
  }

 private:
  char* prepared_row(int64_t group, int64_t row) const {
    return base_ + prepared_offset_ + row_bytes_ * static_cast<size_t>(group * call_.m + row);
  }
  char* panel(int64_t group, int64_t chunk) const {
    return base_ + panels_offset_ + panel_bytes_ * static_cast<size_t>(group * chunks_ + chunk);
  }

  void prepare_unit(uint32_t unit) {
    const int64_t k = call_.weight.k;
    const int64_t element = call_.x_type == ActivationType::kF32 ? 4 : 2;
    const int64_t end =
        std::min<int64_t>((unit + int64_t{1}) * chunks_per_unit_, call_.groups * chunks_);
    for (int64_t c = unit * chunks_per_unit_; c < end; ++c) {
      const int64_t group = c / chunks_, chunk = c % chunks_;
      const int64_t row_begin = chunk * chunk_rows_;
      const int64_t rows = std::min(chunk_rows_, call_.m - row_begin);
      const char* x =
          static_cast<const char*>(call_.x) + (row_begin * call_.ldx + group * k) * element;
      kernel_.prepare(call_.x_type, x, call_.ldx, k, 0, rows, prepared_row(group, row_begin));
      if (panel_bytes_ != 0) {
        int32_t row_ids[kPanelRows];
        for (int64_t i = 0; i < rows; ++i) row_ids[i] = static_cast<int32_t>(i);
        kernel_.make_panel(prepared_row(group, row_begin), k, row_ids, rows, panel(group, chunk));
      }
    }
    prepare_left_.fetch_sub(1, std::memory_order_acq_rel);
  }

  void matmul_unit(uint32_t unit, int participant) {
    const int64_t group = unit / blocks_, block = unit % blocks_;
    WeightView w = call_.weight;
    w.data += group * call_.weight_group_bytes;
    if (w.scale != nullptr) w.scale += group * call_.scale_group_bytes;
    const int64_t n_begin = block * block_rows_, n_end = std::min(w.n, n_begin + block_rows_);
    const int64_t n = n_end - n_begin;

    float* out;
    int64_t ldo;
    if (call_.y_type == ActivationType::kF32) {
      out = static_cast<float*>(call_.y) + group * w.n + n_begin;
      ldo = call_.ldy;
    } else {
      out = reinterpret_cast<float*>(base_ + tiles_offset_) + tile_floats_ * participant;
      ldo = n;
    }
    if (panel_bytes_ == 0) {
      kernel_.matmul(w, n_begin, n_end, prepared_row(group, 0), nullptr, call_.m, out, ldo);
    } else {
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int64_t row = chunk * chunk_rows_;
        kernel_.matmul(w, n_begin, n_end, panel(group, chunk), nullptr,
                       std::min(chunk_rows_, call_.m - row), out + row * ldo, ldo);
      }
    }
    if (call_.y_type == ActivationType::kBf16) {
      uint16_t* y = static_cast<uint16_t*>(call_.y) + group * w.n + n_begin;
      for (int64_t i = 0; i < call_.m; ++i) round_to_bf16(out + i * ldo, n, y + i * call_.ldy);
    }
  }

  const LinearCall& call_;
  const MatmulKernel& kernel_;
  Tracer& tracer_;
  char* base_ = nullptr;
  int64_t chunk_rows_ = 0, chunks_ = 0, chunks_per_unit_ = 0, block_rows_ = 0, blocks_ = 0;
  size_t row_bytes_ = 0, panel_bytes_ = 0, tile_floats_ = 0;
  size_t prepared_offset_ = 0, panels_offset_ = 0, tiles_offset_ = 0;
  uint32_t first_unit_[2][kMaxNodes] = {};
  bool alone_ = false;
  alignas(kCacheLine) std::atomic<uint32_t> prepare_left_{0};
};

}  // namespace

Status linear(CpuRuntime& runtime, const LinearCall& call) {
  if (call.m == 0 || call.groups == 0 || call.weight.n == 0) return {};
  const OperationScope scope(runtime.tracer(), Part::kLinear, call.m);
  const MatmulKernel& kernel = runtime.kernel(call.family, call.weight.format, call.x_type);
  LinearJob job(call, kernel, runtime.tracer());
  JobShape shape;
  Pool& pool = runtime.pool();
  JobSlot* slot = pool.acquire();
  Status status = job.plan(runtime, &slot->scratch, &shape);
  if (status.ok()) {
    if (job.alone()) {
      pool.run_alone(&job, shape);
    } else {
      pool.run(slot, &job, shape);
    }
    RuntimeStats& stats = runtime.stats();
    stats.linear_calls.fetch_add(1, std::memory_order_relaxed);
    stats.linear_weight_bytes.fetch_add(
        static_cast<uint64_t>(call.groups * call.weight.n * call.weight.row_stride_bytes),
        std::memory_order_relaxed);
    stats.linear_flops.fetch_add(
        static_cast<uint64_t>(2 * call.groups * call.weight.n * call.weight.k * call.m),
        std::memory_order_relaxed);
  }
  pool.release(slot);
  return status;
}

}  // namespace jaxmoe

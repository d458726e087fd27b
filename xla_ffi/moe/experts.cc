#include "moe/experts.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "moe/elementwise.h"
#include "moe/tiling.h"
#include "runtime/futex.h"

namespace jaxmoe {
namespace {

// As in linear.cc: below these, sharing costs more than it saves.
constexpr int64_t kConvertAlone = 32 << 10;
constexpr int64_t kComputeAlone = 128 << 10;
// Register tiles of the many-row kernels are up to 16 weight rows; for few tokens the NUMA split's
// granule does, and leaves more units to share.
constexpr int64_t kManyTokensStep = 16;

}  // namespace

Status ExpertsJob::plan(CpuRuntime& runtime, const ExpertWeights& weights, const ExpertsCall& call,
                        Scratch* scratch, JobShape* shape) {
  call_ = call;
  tracer_ = &runtime.tracer();
  num_nodes_ = weights.num_nodes();
  num_experts_ = weights.spec().num_experts;
  hidden_ = weights.spec().hidden;
  intermediate_ = weights.spec().intermediate;
  kernel_ = &runtime.kernel(call.family, weights.spec().format, call.x_type);
  *shape = JobShape{};
  shape->phases = 4;
  shape->nodes = num_nodes_;

  // Kept per thread, so that planning allocates nothing after the first call.
  thread_local std::vector<int32_t> count;
  Status status = count_tokens(weights, &count);
  if (!status.ok()) return status;
  if (num_pairs_ == 0) {
    if (!call.add) {
      std::memset(call.y, 0, static_cast<size_t>(call.num_tokens * hidden_) * sizeof(float));
    }
    alone_ = true;
    return {};
  }
  few_ = most_pairs_ <= runtime.few_tokens();
  choose_units(weights, runtime.num_threads(), shape);
  status = lay_out(weights, count, runtime.num_threads(), scratch);
  if (!status.ok()) return status;
  sort_pairs(&count);
  if (prepare_now_) prepare_unit(0);

  RuntimeStats& stats = runtime.stats();
  stats.experts_calls.fetch_add(1, std::memory_order_relaxed);
  stats.experts_distinct.fetch_add(static_cast<uint64_t>(num_groups_), std::memory_order_relaxed);
  stats.experts_flops.fetch_add(static_cast<uint64_t>(6 * num_pairs_ * hidden_ * intermediate_),
                                std::memory_order_relaxed);
  stats.experts_weight_bytes.fetch_add(static_cast<uint64_t>(num_groups_ * weights.expert_bytes()),
                                       std::memory_order_relaxed);
  return {};
}

int32_t ExpertsJob::expert_of(int64_t i) const {
  const int64_t e = int64_t{call_.expert_ids[i]} - call_.first_expert;
  return e < 0 || e >= num_experts_ ? -1 : static_cast<int32_t>(e);
}

Status ExpertsJob::count_tokens(const ExpertWeights& weights, std::vector<int32_t>* count) {
  count->assign(static_cast<size_t>(num_experts_), 0);
  num_pairs_ = num_groups_ = most_pairs_ = 0;
  for (int64_t i = 0; i < call_.num_tokens * call_.per_token; ++i) {
    const int32_t e = expert_of(i);
    if (e < 0 && (call_.add || call_.expert_ids[i] == -1)) continue;
    if (e < 0) {
      return Status::error("expert_ids[" + std::to_string(i / call_.per_token) + ", " +
                           std::to_string(i % call_.per_token) + "] is " +
                           std::to_string(call_.expert_ids[i]) + ", but MoE layer " +
                           std::to_string(call_.layer) + " has experts 0 to " +
                           std::to_string(num_experts_ - 1) + " (-1: none)");
    }
    ++num_pairs_;
    num_groups_ += (*count)[e]++ == 0;
  }
  for (int64_t e = 0; e < num_experts_; ++e) {
    if ((*count)[e] == 0) continue;
    most_pairs_ = std::max<int64_t>(most_pairs_, (*count)[e]);
    Status status = weights.check_loaded(static_cast<int>(e));
    if (!status.ok()) return status;
  }
  return {};
}

void ExpertsJob::choose_units(const ExpertWeights& weights, int num_threads, JobShape* shape) {
  const int64_t step = !few_ ? kManyTokensStep : HostStore::kRowSplit;
  const int64_t row_bytes1 = weights.row_bytes(Matrix::kGate);
  const int64_t row_bytes2 = weights.row_bytes(Matrix::kDown);
  threads_on_node_ = (num_threads + num_nodes_ - 1) / num_nodes_;
  step_ = step;
  // A stage-1 unit reads rows of gate and of up; a stage-2 unit reads its rows of every distinct
  // expert.
  block1_ = rows_per_unit(num_groups_ * intermediate_, 2 * row_bytes1, num_threads, step, few_);
  block1_ = std::min(block1_, (intermediate_ + step - 1) / step * step);
  block2_ = rows_per_unit(hidden_, num_groups_ * row_bytes2, num_threads, step, false);

  prepare_rows_ = std::max<int64_t>(1, kConvertAlone / 2 / hidden_);
  uint32_t prepare_units =
      static_cast<uint32_t>((call_.num_tokens + prepare_rows_ - 1) / prepare_rows_);
  prepare_now_ = call_.num_tokens * hidden_ <= kConvertAlone;
  if (prepare_now_) {
    // The caller converts the few tokens itself, as one unit, before it opens the job.
    prepare_rows_ = call_.num_tokens;
    prepare_units = 0;
  }
  prepare_left_.store(std::max(prepare_units, 1u), std::memory_order_relaxed);
  shape->spread(kPrepare, prepare_units);
  if (kernel_->panel_bytes != nullptr) shape->spread(kPanels, static_cast<uint32_t>(num_groups_));
  uint32_t prepare = 0, panel = 0;
  for (int node = 0; node < num_nodes_; ++node) {
    first_prepare_[node] = prepare;
    first_panel_[node] = panel;
    prepare += shape->units[kPrepare][node];
    panel += shape->units[kPanels][node];
    auto [begin1, end1] = node_rows(intermediate_, node, num_nodes_);
    auto [begin2, end2] = node_rows(hidden_, node, num_nodes_);
    blocks1_[node] = (end1 - begin1 + block1_ - 1) / block1_;
    shape->units[kStage1][node] = static_cast<uint32_t>(num_groups_ * blocks1_[node]);
    uint32_t units2 = 0;
    for (int64_t row = begin2; row < end2; ++units2) row += stage2_rows(end2 - row);
    shape->units[kStage2][node] = units2;
  }
  alone_ =
      3 * num_groups_ * intermediate_ * hidden_ <= kComputeAlone && num_pairs_ <= 2 * num_groups_;
}

Status ExpertsJob::lay_out(const ExpertWeights& weights, const std::vector<int32_t>& count,
                           int num_threads, Scratch* scratch) {
  Layout layout;
  tokens_ = layout.add(static_cast<size_t>(num_pairs_) * sizeof(int32_t));
  pair_ids_ = layout.add(static_cast<size_t>(num_pairs_) * sizeof(int32_t));
  weights_ = layout.add(static_cast<size_t>(num_pairs_) * sizeof(float));
  groups_ = layout.add(static_cast<size_t>(num_groups_) * sizeof(Group));
  views_ =
      layout.add(static_cast<size_t>(num_groups_ * kNumMatrices * num_nodes_) * sizeof(WeightView));
  x_row_bytes_ = kernel_->prepared_row_bytes(hidden_);
  h_row_bytes_ = kernel_->prepared_row_bytes(intermediate_);
  x_prepared_ = layout.add(x_row_bytes_ * static_cast<size_t>(call_.num_tokens));
  h_ = layout.add(static_cast<size_t>(num_pairs_ * intermediate_) * sizeof(float));
  h_prepared_ = layout.add(h_row_bytes_ * static_cast<size_t>(num_pairs_));
  int64_t most_rows2 = 0;  // the first unit's
  for (int node = 0; node < num_nodes_; ++node) {
    auto [begin, end] = node_rows(hidden_, node, num_nodes_);
    most_rows2 = std::max(most_rows2, stage2_rows(end - begin));
  }
  tile_floats_ = align_up(static_cast<size_t>(most_pairs_ * std::max(2 * block1_, most_rows2)), 16);
  tiles_ = layout.add(tile_floats_ * sizeof(float) * static_cast<size_t>(num_threads));
  const size_t panels = layout.total();
  if (kernel_->panel_bytes != nullptr) {
    for (int32_t m : count) {
      if (m == 0) continue;
      layout.add(kernel_->panel_bytes(m, hidden_));
      layout.add(kernel_->panel_bytes(m, intermediate_));
    }
  }
  if (!scratch->reserve(layout.total())) {
    return Status::error("out of memory for " + std::to_string(layout.total()) +
                         " bytes of activations of " + std::to_string(call_.num_tokens) +
                         " tokens: use smaller prefill chunks");
  }
  base_ = scratch->data();

  Layout panel_layout;
  int64_t g = 0;
  int32_t pair = 0;
  for (size_t e = 0; e < count.size(); ++e) {
    if (count[e] == 0) continue;
    Group* group = new (at<Group>(groups_) + g) Group;
    group->expert = static_cast<int32_t>(e);
    group->begin = pair;
    group->end = pair += count[e];
    uint32_t units = 0;
    for (int node = 0; node < num_nodes_; ++node) units += static_cast<uint32_t>(blocks1_[node]);
    group->stage1_left.store(units, std::memory_order_relaxed);
    if (kernel_->panel_bytes != nullptr) {
      group->panel1 = panels + panel_layout.add(kernel_->panel_bytes(count[e], hidden_));
      group->panel2 = panels + panel_layout.add(kernel_->panel_bytes(count[e], intermediate_));
    }
    for (int m = 0; m < kNumMatrices; ++m) {
      for (int node = 0; node < num_nodes_; ++node) {
        new (at<WeightView>(views_) + (g * kNumMatrices + m) * num_nodes_ + node)
            WeightView(weights.view(static_cast<int>(e), static_cast<Matrix>(m), node));
      }
    }
    ++g;
  }
  return {};
}

// Counting sort of the pairs by expert, tokens ascending within one.
void ExpertsJob::sort_pairs(std::vector<int32_t>* count) {
  std::vector<int32_t>& next = *count;
  for (int64_t g = 0; g < num_groups_; ++g) {
    const Group& group = at<Group>(groups_)[g];
    next[group.expert] = group.begin;
  }
  for (int64_t t = 0; t < call_.num_tokens; ++t) {
    for (int64_t a = 0; a < call_.per_token; ++a) {
      const int32_t e = expert_of(t * call_.per_token + a);
      if (e < 0) continue;
      const int32_t pair = next[e]++;
      at<int32_t>(tokens_)[pair] = static_cast<int32_t>(t);
      at<int32_t>(pair_ids_)[pair] = pair;
      at<float>(weights_)[pair] = call_.weights[t * call_.per_token + a];
    }
  }
}

void ExpertsJob::run_unit(int phase, int node, uint32_t unit, int participant) noexcept {
  switch (phase) {
    case kPrepare:
      return prepare_unit(first_prepare_[node] + unit);
    case kPanels:
      return panel_unit(first_panel_[node] + unit);
    case kStage1:
      return stage1_unit(node, unit, participant);
    case kStage2:
      return stage2_unit(node, unit, participant);
  }
}

void ExpertsJob::prepare_unit(uint32_t unit) {
  const int64_t begin = unit * prepare_rows_;
  const int64_t end = std::min(call_.num_tokens, begin + prepare_rows_);
  kernel_->prepare(call_.x_type, call_.x, hidden_, hidden_, begin, end, base_ + x_prepared_);
  prepare_left_.fetch_sub(1, std::memory_order_acq_rel);
}

void ExpertsJob::wait_prepared() {
  tracer_->wait(part(), [this] { return prepare_left_.load(std::memory_order_acquire) == 0; });
}

void ExpertsJob::panel_unit(uint32_t unit) {
  wait_prepared();
  Group& group = at<Group>(groups_)[unit];
  kernel_->make_panel(base_ + x_prepared_, hidden_, at<int32_t>(tokens_) + group.begin,
                      group.end - group.begin, base_ + group.panel1);
  group.panel_ready.store(1, std::memory_order_release);
}

void ExpertsJob::stage1_unit(int node, uint32_t unit, int participant) {
  const int64_t g = unit / blocks1_[node];
  Group& group = at<Group>(groups_)[g];
  const int64_t m = group.end - group.begin;
  auto [node_begin, node_end] = node_rows(intermediate_, node, num_nodes_);
  const int64_t f_begin = node_begin + unit % blocks1_[node] * block1_;
  const int64_t f_end = std::min(node_end, f_begin + block1_);
  const int64_t f = f_end - f_begin;

  const void* x;
  const int32_t* rows;
  if (kernel_->panel_bytes != nullptr) {
    tracer_->wait(part(),
                  [&group] { return group.panel_ready.load(std::memory_order_acquire) != 0; });
    x = base_ + group.panel1;
    rows = nullptr;
  } else {
    wait_prepared();
    x = base_ + x_prepared_;
    rows = at<int32_t>(tokens_) + group.begin;
  }
  float* gate = at<float>(tiles_) + tile_floats_ * static_cast<size_t>(participant);
  float* up = gate + m * f;
  kernel_->matmul(view(g, Matrix::kGate, node), f_begin, f_end, x, rows, m, gate, f);
  kernel_->matmul(view(g, Matrix::kUp, node), f_begin, f_end, x, rows, m, up, f);
  float* h = at<float>(h_) + group.begin * intermediate_ + f_begin;
  const int64_t bias = group.expert * intermediate_ + f_begin;
  for (int64_t i = 0; i < m; ++i) {
    if (call_.gate_bias != nullptr) {
      add_scaled(call_.gate_bias + bias, 1.0f, f, gate + i * f);
      add_scaled(call_.up_bias + bias, 1.0f, f, up + i * f);
    }
    if (call_.limit > 0) {
      swiglu_clamped(gate + i * f, up + i * f, f, {call_.alpha, call_.limit, call_.up_offset},
                     h + i * intermediate_);
    } else {
      swiglu(gate + i * f, up + i * f, f, h + i * intermediate_);
    }
  }
  if (group.stage1_left.fetch_sub(1, std::memory_order_acq_rel) == 1) finish_stage1(group);
}

// The thread that ends an expert's stage 1 turns its hidden activations into stage 2's form: FP32
// for the vector family, BF16 (and the panel) for the matrix family, as the kernel wants them.
void ExpertsJob::finish_stage1(Group& group) {
  const int64_t m = group.end - group.begin;
  kernel_->prepare(ActivationType::kF32, at<float>(h_) + group.begin * intermediate_, intermediate_,
                   intermediate_, 0, m,
                   base_ + h_prepared_ + h_row_bytes_ * static_cast<size_t>(group.begin));
  if (kernel_->panel_bytes != nullptr) {
    // Row numbers are those of the whole prepared matrix; pair i is row i of it.
    kernel_->make_panel(base_ + h_prepared_, intermediate_, at<int32_t>(pair_ids_) + group.begin, m,
                        base_ + group.panel2);
  }
  group.stage2_ready.store(1, std::memory_order_release);
}

// A stage-2 unit's run in each expert's matrix is 1/num_groups of what the unit reads, hence long
// ones first.
int64_t ExpertsJob::stage2_rows(int64_t left) const {
  if (!few_) return std::min(left, block2_);
  return guided_rows(left, threads_on_node_, block2_, step_);
}

void ExpertsJob::stage2_unit(int node, uint32_t unit, int participant) {
  auto [node_begin, node_end] = node_rows(hidden_, node, num_nodes_);
  int64_t d_begin = node_begin;
  for (uint32_t before = 0; before < unit; ++before) d_begin += stage2_rows(node_end - d_begin);
  const int64_t d = stage2_rows(node_end - d_begin), d_end = d_begin + d;
  for (int64_t t = 0; t < call_.num_tokens && !call_.add; ++t) {
    std::memset(call_.y + t * hidden_ + d_begin, 0, static_cast<size_t>(d) * sizeof(float));
  }
  float* tile = at<float>(tiles_) + tile_floats_ * static_cast<size_t>(participant);
  for (int64_t g = 0; g < num_groups_; ++g) {
    Group& group = at<Group>(groups_)[g];
    const int64_t m = group.end - group.begin;
    tracer_->wait(part(),
                  [&group] { return group.stage2_ready.load(std::memory_order_acquire) != 0; });
    const void* x = kernel_->panel_bytes != nullptr
                        ? base_ + group.panel2
                        : base_ + h_prepared_ + h_row_bytes_ * static_cast<size_t>(group.begin);
    kernel_->matmul(view(g, Matrix::kDown, node), d_begin, d_end, x, nullptr, m, tile, d);
    const int32_t* tokens = at<int32_t>(tokens_) + group.begin;
    const float* weights = at<float>(weights_) + group.begin;
    for (int64_t i = 0; i < m; ++i) {
      add_scaled(tile + i * d, weights[i], d, call_.y + tokens[i] * hidden_ + d_begin);
    }
  }
}

Status experts(CpuRuntime& runtime, const ExpertWeights& weights, const ExpertsCall& call) {
  if (call.num_tokens == 0) return {};
  const OperationScope scope(runtime.tracer(), Part::kExperts, call.layer);
  ExpertsJob job;
  JobShape shape;
  Pool& pool = runtime.pool();
  JobSlot* slot = pool.acquire();
  Status status = job.plan(runtime, weights, call, &slot->scratch, &shape);
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

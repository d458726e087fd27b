#include "attention/gated_delta.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention/gated_delta_kernels.h"

namespace jaxmoe {
namespace {

constexpr float kNormEps = 1e-6f;  // of the lengths of queries and keys
// Channels of a unit of the convolution: some microseconds of work, and enough units for one token.
constexpr int64_t kSliceChannels = 1024;

size_t float_bytes(int64_t count) { return static_cast<size_t>(count) * sizeof(float); }

// The tokens of one row in this step.
struct Run {
  int64_t first = 0, count = 0;
  int32_t from = 0, to = 0;
  bool from_zeros = false;
};

// Before the recurrence: convolved and normalized q, k, v, and every head's decay and rate.
class MixJob final : public Job {
 public:
  MixJob(const GatedDeltaCall& call, const GatedDeltaKernels& kernels, const Run* runs,
         const int32_t* run_of_token, float* mixed, float* decay, float* rate)
      : Job(Part::kAttention),
        call_(call),
        kernels_(kernels),
        runs_(runs),
        run_of_token_(run_of_token),
        mixed_(mixed),
        decay_(decay),
        rate_(rate) {
    // A slice is whole heads, so that a unit can normalize them.
    const int64_t head = std::max(call.key_dim, call.value_dim);
    heads_per_slice_ = std::max<int64_t>(1, kSliceChannels / head);
    const int64_t heads = 2 * call.num_key_heads + call.num_value_heads;
    slices_ = (heads + heads_per_slice_ - 1) / heads_per_slice_;
  }

  uint64_t units() const { return static_cast<uint64_t>(call_.num_tokens * slices_); }
  void set_shape(JobShape* shape, int nodes) {
    shape->nodes = nodes;
    shape->spread(0, static_cast<uint32_t>(units()));
    uint32_t first = 0;
    for (int node = 0; node < nodes; ++node) {
      first_unit_[node] = first;
      first += shape->units[0][node];
    }
  }

  void run_unit(int, int node, uint32_t unit, int) noexcept override {
    unit += first_unit_[node];
    const int64_t t = unit / slices_, slice = unit % slices_;
    const int32_t r = run_of_token_[t];
    if (r < 0) return;
    const Run& run = runs_[r];
    const int64_t channels = call_.channels();
    ConvCall conv;
    conv.width = call_.conv_width;
    conv.weight = call_.conv_weight;
    conv.weight_ld = channels;
    for (int64_t w = 0; w < call_.conv_width; ++w) {
      const int64_t back = call_.conv_width - 1 - w, in_run = t - run.first;
      conv.inputs[w] = back <= in_run ? call_.qkv + (t - back) * channels
                                      : state_input(run, call_.conv_width - 1 + in_run - back);
    }
    conv.out = mixed_ + t * channels;
    const int64_t queries = call_.num_key_heads, keys = 2 * call_.num_key_heads;
    const int64_t heads = keys + call_.num_value_heads;
    const int64_t end = std::min(heads, (slice + 1) * heads_per_slice_);
    for (int64_t h = slice * heads_per_slice_; h < end; ++h) {
      const int64_t dim = h < keys ? call_.key_dim : call_.value_dim;
      conv.begin = h < keys ? h * dim : keys * call_.key_dim + (h - keys) * dim;
      conv.end = conv.begin + dim;
      kernels_.convolve(conv);
      if (h < keys) {
        const float scale = h < queries ? 1.0f / std::sqrt(static_cast<float>(dim)) : 1.0f;
        kernels_.normalize(conv.out + conv.begin, dim, kNormEps, scale);
      } else {
        set_decay(t, h - keys);
      }
    }
  }

 private:
  // The input `index` of those the state holds, oldest first.
  const float* state_input(const Run& run, int64_t index) const {
    if (run.from_zeros) return zeros();
    return call_.conv_state + (run.from * (call_.conv_width - 1) + index) * call_.channels();
  }
  const float* zeros() const { return mixed_ + call_.num_tokens * call_.channels(); }
  void set_decay(int64_t t, int64_t head) const {
    const int64_t i = t * call_.num_value_heads + head;
    const float x = call_.decay_input[i] + call_.dt_bias[head];
    // softplus without overflow.
    const float soft = std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x)));
    decay_[i] = std::isnan(x) ? x : std::exp(-std::exp(call_.a_log[head]) * soft);
    rate_[i] = 1.0f / (1.0f + std::exp(-call_.rate_input[i]));
  }

  const GatedDeltaCall& call_;
  const GatedDeltaKernels& kernels_;
  const Run* runs_;
  const int32_t* run_of_token_;
  float* mixed_;
  float* decay_;
  float* rate_;
  int64_t heads_per_slice_ = 1, slices_ = 1;
  uint32_t first_unit_[kMaxNodes] = {};
};

// The recurrence, a unit some columns of one head's state of one row; and one unit a row that moves
// the convolution's inputs on.
class UpdateJob final : public Job {
 public:
  UpdateJob(const GatedDeltaCall& call, const GatedDeltaKernels& kernels,
            const std::vector<Run>& runs, const float* mixed, const float* decay, const float* rate,
            float* blocks)
      : Job(Part::kAttention),
        call_(call),
        kernels_(kernels),
        runs_(runs),
        mixed_(mixed),
        decay_(decay),
        rate_(rate),
        blocks_(blocks),
        tiles_((call.value_dim + kDeltaColumns - 1) / kDeltaColumns),
        units_per_run_(call.num_value_heads * tiles_ + 1) {}

  uint64_t units() const { return runs_.size() * static_cast<uint64_t>(units_per_run_); }
  void set_shape(JobShape* shape, int nodes) {
    shape->nodes = nodes;
    shape->spread(0, static_cast<uint32_t>(units()));
    uint32_t first = 0;
    for (int node = 0; node < nodes; ++node) {
      first_unit_[node] = first;
      first += shape->units[0][node];
    }
  }

  void run_unit(int, int node, uint32_t unit, int participant) noexcept override {
    unit += first_unit_[node];
    const Run& run = runs_[unit / units_per_run_];
    const int64_t part = unit % units_per_run_;
    if (part == units_per_run_ - 1) {
      move_inputs(run);
    } else {
      update(run, part / tiles_, part % tiles_, participant);
    }
  }

 private:
  float* state(int32_t slot, int64_t head, int64_t column) const {
    const int64_t cells = call_.key_dim * call_.value_dim;
    return call_.delta_state + (slot * call_.num_value_heads + head) * cells + column;
  }

  void update(const Run& run, int64_t head, int64_t tile, int participant) const {
    const int64_t column = tile * kDeltaColumns;
    DeltaCall delta;
    delta.columns = std::min(kDeltaColumns, call_.value_dim - column);
    delta.key_dim = call_.key_dim;
    // Side by side, so that rows a power of two apart do not evict each other.
    delta.block = blocks_ + participant * call_.key_dim * kDeltaColumns;
    if (run.from_zeros) {
      std::memset(delta.block, 0, float_bytes(delta.key_dim * delta.columns));
    } else {
      copy(state(run.from, head, column), call_.value_dim, delta.block, delta.columns,
           delta.columns);
    }
    const int64_t channels = call_.channels();
    const int64_t key_head = head / (call_.num_value_heads / call_.num_key_heads);
    delta.stride = channels;
    delta.scalar_stride = call_.num_value_heads;
    delta.out_stride = call_.num_value_heads * call_.value_dim;
    const int64_t end = run.first + run.count;
    for (int64_t t = run.first; t < end;) {
      int64_t stop = t;
      while (stop + 1 < end && call_.state_saves[stop] < 0) ++stop;
      delta.num_tokens = stop + 1 - t;
      const float* token = mixed_ + t * channels;
      delta.q = token + key_head * call_.key_dim;
      delta.k = delta.q + call_.key_row();
      delta.v = token + 2 * call_.key_row() + head * call_.value_dim + column;
      delta.decay = decay_ + t * call_.num_value_heads + head;
      delta.rate = rate_ + t * call_.num_value_heads + head;
      delta.out = call_.out + t * delta.out_stride + head * call_.value_dim + column;
      kernels_.update(delta);
      const int32_t save = call_.state_saves[stop];
      if (save >= 0) {
        copy(delta.block, delta.columns, state(save, head, column), call_.value_dim, delta.columns);
      }
      t = stop + 1;
    }
    copy(delta.block, delta.columns, state(run.to, head, column), call_.value_dim, delta.columns);
  }

  // key_dim rows of `columns`.
  void copy(const float* from, int64_t from_ld, float* to, int64_t to_ld, int64_t columns) const {
    for (int64_t k = 0; k < call_.key_dim; ++k) {
      std::memcpy(to + k * to_ld, from + k * from_ld, float_bytes(columns));
    }
  }

  // What the convolution saw last before the run's token `count` (of the whole run: after it).
  void write_inputs(const Run& run, int64_t count, int32_t slot) const {
    const int64_t held = call_.conv_width - 1, channels = call_.channels();
    float* to = call_.conv_state + slot * held * channels;
    const float* from = call_.conv_state + run.from * held * channels;
    // Oldest first: a row of `from` is read before it is written where both are the same.
    for (int64_t j = 0; j < held; ++j) {
      const int64_t index = count - held + j;
      if (index >= 0) {
        std::memcpy(to + j * channels, call_.qkv + (run.first + index) * channels,
                    float_bytes(channels));
      } else if (run.from_zeros) {
        std::memset(to + j * channels, 0, float_bytes(channels));
      } else {
        std::memmove(to + j * channels, from + (held + index) * channels, float_bytes(channels));
      }
    }
  }

  void move_inputs(const Run& run) const {
    for (int64_t i = 0; i < run.count; ++i) {
      const int32_t save = call_.state_saves[run.first + i];
      if (save >= 0) write_inputs(run, i + 1, save);
    }
    write_inputs(run, run.count, run.to);
  }

  const GatedDeltaCall& call_;
  const GatedDeltaKernels& kernels_;
  const std::vector<Run>& runs_;
  const float* mixed_;
  const float* decay_;
  const float* rate_;
  float* blocks_;
  const int64_t tiles_, units_per_run_;
  uint32_t first_unit_[kMaxNodes] = {};
};

Status slot_error(const char* name, int64_t i, int64_t slot, const std::string& wanted) {
  return Status::error(std::string(name) + "[" + std::to_string(i) + "] is " +
                       std::to_string(slot) + "; wanted " + wanted);
}

// The rows' runs; who reads a slot that another one writes, or writes one twice, is refused.
Status find_runs(const GatedDeltaCall& call, std::vector<Run>* runs,
                 std::vector<int32_t>* run_of_token) {
  runs->clear();
  run_of_token->assign(static_cast<size_t>(call.num_tokens), -1);
  std::vector<uint8_t> seen(static_cast<size_t>(call.num_rows), 0);
  std::vector<uint8_t> written(static_cast<size_t>(call.num_slots), 0);
  const std::string slots = "a slot from 0 to " + std::to_string(call.num_slots - 1);
  auto write = [&](const char* name, int64_t i, int32_t slot) -> Status {
    if (slot < 0 || slot >= call.num_slots) return slot_error(name, i, slot, slots);
    if (written[static_cast<size_t>(slot)]++) {
      return slot_error(name, i, slot, "a slot that nothing else in the step writes");
    }
    return {};
  };
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    const int32_t row = call.token_rows[t];
    if (row == -1) continue;
    if (row < 0 || row >= call.num_rows) {
      return slot_error("token_rows", t, row,
                        "a row from 0 to " + std::to_string(call.num_rows - 1));
    }
    if (t == 0 || call.token_rows[t - 1] != row) {
      if (seen[static_cast<size_t>(row)]++) {
        return slot_error("token_rows", t, row, "the tokens of a row side by side");
      }
      Run run;
      run.first = t;
      run.from = call.state_from[row];
      run.to = call.state_to[row];
      run.from_zeros = call.positions[t] == 0;
      if (run.from < 0 || run.from >= call.num_slots) {
        return slot_error("state_from", row, run.from, slots);
      }
      Status status = write("state_to", row, run.to);
      if (!status.ok()) return status;
      runs->push_back(run);
    } else if (call.positions[t] != call.positions[t - 1] + 1) {
      return slot_error("positions", t, call.positions[t],
                        "the one after " + std::to_string(call.positions[t - 1]));
    }
    ++runs->back().count;
    (*run_of_token)[static_cast<size_t>(t)] = static_cast<int32_t>(runs->size() - 1);
    if (call.state_saves[t] != -1) {
      Status status = write("state_saves", t, call.state_saves[t]);
      if (!status.ok()) return status;
    }
  }
  for (const Run& run : *runs) {
    if (run.from != run.to && !run.from_zeros && written[static_cast<size_t>(run.from)]) {
      return slot_error("state_from", call.token_rows[run.first], run.from,
                        "a slot that no other row writes");
    }
  }
  return {};
}

}  // namespace

const GatedDeltaKernels& gated_delta_kernels(Isa isa) {
  static const GatedDeltaKernels scalar = attention_isa::scalar_delta_kernels();
  static const GatedDeltaKernels avx2 = attention_isa::avx2_delta_kernels();
  static const GatedDeltaKernels avx512 = attention_isa::avx512_delta_kernels();
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

Status gated_delta(CpuRuntime& runtime, const GatedDeltaCall& call) {
  const OperationScope scope(runtime.tracer(), Part::kAttention, call.num_tokens);
  if (call.num_tokens == 0) return {};
  // Kept per thread: no allocation after the largest step.
  thread_local std::vector<Run> runs;
  thread_local std::vector<int32_t> run_of_token;
  Status status = find_runs(call, &runs, &run_of_token);
  if (!status.ok()) return status;
  const int64_t row = call.num_value_heads * call.value_dim;
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    if (run_of_token[static_cast<size_t>(t)] < 0) {
      std::memset(call.out + t * row, 0, float_bytes(row));
    }
  }
  if (runs.empty()) return {};
  Pool& pool = runtime.pool();
  Layout layout;
  // The row after the last token is zeros: the convolution's inputs before a text.
  const size_t mixed = layout.add(float_bytes((call.num_tokens + 1) * call.channels()));
  const size_t decay = layout.add(float_bytes(call.num_tokens * call.num_value_heads));
  const size_t rate = layout.add(float_bytes(call.num_tokens * call.num_value_heads));
  const size_t blocks =
      layout.add(float_bytes(runtime.num_threads() * call.key_dim * kDeltaColumns));
  JobSlot* slot = pool.acquire();
  if (slot->scratch.reserve(layout.total())) {
    auto part = [slot](size_t offset) {
      return reinterpret_cast<float*>(slot->scratch.data() + offset);
    };
    std::memset(part(mixed) + call.num_tokens * call.channels(), 0, float_bytes(call.channels()));
    const GatedDeltaKernels& kernels = gated_delta_kernels(runtime.isa());
    MixJob mix(call, kernels, runs.data(), run_of_token.data(), part(mixed), part(decay),
               part(rate));
    UpdateJob update(call, kernels, runs, part(mixed), part(decay), part(rate), part(blocks));
    if (std::max(mix.units(), update.units()) > kMaxUnits) {
      status = Status::error("linear attention of " + std::to_string(call.num_tokens) +
                             " tokens is beyond one call: pack fewer");
    } else {
      JobShape shape;
      mix.set_shape(&shape, runtime.num_nodes());
      pool.run(slot, &mix, shape);
      shape = JobShape();
      update.set_shape(&shape, runtime.num_nodes());
      pool.run(slot, &update, shape);
    }
  } else {
    status = Status::error("out of memory for " + std::to_string(layout.total()) +
                           " bytes of linear attention's scratch");
  }
  pool.release(slot);
  return status;
}

}  // namespace jaxmoe

// The routed experts of one MoE layer for the tokens of a step:
//
//   y[t] = sum over the token's experts e, ascending: weight * down_e(silu(gate_e(x[t])) *
//   up_e(x[t]))
//
// Tokens are grouped by expert, so each distinct expert's rows are read once for all its tokens.
// Stage 1 is gate and up with silu * mul fused; stage 2 is down. A stage-2 unit owns a block of
// output columns over all experts and waits for each expert's stage 1 in turn, so there is no
// global barrier, and every sum is added in one order whatever the batch, the threads and the NUMA
// nodes.
#ifndef JAXMOE_MOE_EXPERTS_H_
#define JAXMOE_MOE_EXPERTS_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "moe/expert_weights.h"
#include "runtime/cpu_runtime.h"
#include "runtime/host_store.h"
#include "runtime/status.h"

namespace jaxmoe {

struct ExpertsCall {
  int layer = 0;
  Family family = Family::kVector;
  ActivationType x_type = ActivationType::kBf16;
  const void* x = nullptr;  // [num_tokens, hidden]
  int64_t num_tokens = 0;
  int64_t per_token = 0;
  const int32_t* expert_ids = nullptr;  // [num_tokens, per_token]; -1: none. Repeats are summed.
  const float* weights = nullptr;       // [num_tokens, per_token]
  float* y = nullptr;                   // [num_tokens, hidden], written whole
  // With `add`, the weights are those of a group of the layer's experts, from first_expert on. The
  // group's share is added to y, and ids outside it are other groups'. Groups in ascending order,
  // the first onto zeros, give the bits of the whole.
  bool add = false;
  int32_t first_expert = 0;
  // Added to gate and up before the activation, [experts, intermediate] each (with `add`, the
  // group's); or none.
  const float* gate_bias = nullptr;
  const float* up_bias = nullptr;
  // The activation is swiglu_clamped where there is a limit, else swiglu.
  float alpha = 0, limit = 0, up_offset = 0;
};

class ExpertsJob final : public Job {
 public:
  ExpertsJob() : Job(Part::kExperts) {}
  // Checks the ids, groups the tokens and lays out `scratch`. The call's arrays, the memory of the
  // weights and the scratch must live until the job is done.
  Status plan(CpuRuntime& runtime, const ExpertWeights& weights, const ExpertsCall& call,
              Scratch* scratch, JobShape* shape);
  Status plan(CpuRuntime& runtime, const HostStore& store, const ExpertsCall& call,
              Scratch* scratch, JobShape* shape) {
    return plan(runtime, StoreExperts(store, call.layer), call, scratch, shape);
  }
  // Too little work to share (known after plan).
  bool alone() const { return alone_; }

  void run_unit(int phase, int node, uint32_t unit, int participant) noexcept override;

 private:
  enum Phase { kPrepare = 0, kPanels = 1, kStage1 = 2, kStage2 = 3 };
  // Of one distinct expert of the step.
  struct Group {
    int32_t expert = 0;
    int32_t begin = 0, end = 0;             // its pairs (token, weight)
    size_t panel1 = 0, panel2 = 0;          // offsets from base_
    std::atomic<uint32_t> panel_ready{0};   // stage-1 panel made
    std::atomic<uint32_t> stage1_left{0};   // units
    std::atomic<uint32_t> stage2_ready{0};  // hidden activations prepared
  };

  Status count_tokens(const ExpertWeights& weights, std::vector<int32_t>* count);
  void choose_units(const ExpertWeights& weights, int num_threads, JobShape* shape);
  Status lay_out(const ExpertWeights& weights, const std::vector<int32_t>& count, int num_threads,
                 Scratch* scratch);
  void sort_pairs(std::vector<int32_t>* count);
  // Of pair i among the weights; -1 where it has none there.
  int32_t expert_of(int64_t i) const;

  void prepare_unit(uint32_t unit);
  void panel_unit(uint32_t unit);
  void stage1_unit(int node, uint32_t unit, int participant);
  void finish_stage1(Group& group);
  int64_t stage2_rows(int64_t left) const;  // of the unit that begins where `left` rows are left
  void stage2_unit(int node, uint32_t unit, int participant);
  void wait_prepared();

  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }
  const WeightView& view(int64_t group, Matrix which, int node) const {
    return at<WeightView>(
        views_)[(group * kNumMatrices + static_cast<int>(which)) * num_nodes_ + node];
  }

  ExpertsCall call_;
  Tracer* tracer_ = nullptr;
  const MatmulKernel* kernel_ = nullptr;
  char* base_ = nullptr;
  int num_nodes_ = 1;
  int64_t num_groups_ = 0, num_pairs_ = 0, most_pairs_ = 0;  // most_pairs_: of one expert
  int64_t num_experts_ = 0, hidden_ = 0, intermediate_ = 0;  // E, D, F
  bool few_ = true;                                          // see CpuRuntime::few_tokens
  bool alone_ = false, prepare_now_ = false;
  int64_t prepare_rows_ = 0;         // token rows of a prepare unit
  int64_t block1_ = 0, block2_ = 0;  // weight rows of a stage-1 unit / least of a stage-2 unit
  int64_t step_ = 1;
  int threads_on_node_ = 1;
  int64_t blocks1_[kMaxNodes] = {};  // stage-1 blocks of one expert
  uint32_t first_prepare_[kMaxNodes] = {}, first_panel_[kMaxNodes] = {};
  // Offsets from base_: pairs sorted by expert, groups, views, activations, per-participant tiles.
  size_t tokens_ = 0, pair_ids_ = 0, weights_ = 0, groups_ = 0, views_ = 0;
  size_t x_prepared_ = 0, h_ = 0, h_prepared_ = 0, tiles_ = 0;
  size_t x_row_bytes_ = 0, h_row_bytes_ = 0, tile_floats_ = 0;
  alignas(kCacheLine) std::atomic<uint32_t> prepare_left_{0};
};

// Plans and runs the job with the calling thread taking part.
Status experts(CpuRuntime& runtime, const ExpertWeights& weights, const ExpertsCall& call);
inline Status experts(CpuRuntime& runtime, const HostStore& store, const ExpertsCall& call) {
  return experts(runtime, StoreExperts(store, call.layer), call);
}

}  // namespace jaxmoe

#endif  // JAXMOE_MOE_EXPERTS_H_

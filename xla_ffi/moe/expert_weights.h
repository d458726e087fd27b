// Where the weights of a MoE layer's experts lie, for the operation that computes with them: in the
// host store, or dense in buffers of a program (a slot that a ring has filled).
#ifndef JAXMOE_MOE_EXPERT_WEIGHTS_H_
#define JAXMOE_MOE_EXPERT_WEIGHTS_H_

#include <array>
#include <cstdint>

#include "kernels/kernels.h"
#include "runtime/host_store.h"
#include "runtime/status.h"

namespace jaxmoe {

class ExpertWeights {
 public:
  virtual ~ExpertWeights() = default;
  const ExpertLayerSpec& spec() const { return spec_; }
  int64_t cols(Matrix which) const {
    return which == Matrix::kDown ? spec_.intermediate : spec_.hidden;
  }
  int64_t rows(Matrix which) const {
    return which == Matrix::kDown ? spec_.hidden : spec_.intermediate;
  }
  // Read with a row: its weights, and its scales where rows have their own.
  int64_t row_bytes(Matrix which) const;
  int64_t expert_bytes() const;  // of the three matrices and all their scales

  // As HostStore has them.
  virtual int num_nodes() const = 0;
  virtual Status check_loaded(int expert) const = 0;
  virtual WeightView view(int expert, Matrix which, int node) const = 0;

 protected:
  explicit ExpertWeights(const ExpertLayerSpec& spec) : spec_(spec) {}

 private:
  const ExpertLayerSpec spec_;
};

class StoreExperts final : public ExpertWeights {
 public:
  StoreExperts(const HostStore& store, int layer)
      : ExpertWeights(store.layer(layer)), store_(store), layer_(layer) {}
  int num_nodes() const override { return store_.num_nodes(); }
  Status check_loaded(int expert) const override { return store_.check_loaded(layer_, expert); }
  WeightView view(int expert, Matrix which, int node) const override {
    return store_.view(layer_, expert, which, node);
  }

 private:
  const HostStore& store_;
  const int layer_;
};

class BufferExperts final : public ExpertWeights {
 public:
  // Of each matrix its data [experts, rows, row bytes], and its scales or nullptr.
  BufferExperts(const ExpertLayerSpec& spec, const std::array<const uint8_t*, kNumMatrices>& data,
                const std::array<const uint8_t*, kNumMatrices>& scales)
      : ExpertWeights(spec), data_(data), scales_(scales) {}
  int num_nodes() const override { return 1; }
  Status check_loaded(int) const override { return {}; }
  WeightView view(int expert, Matrix which, int node) const override;

 private:
  const std::array<const uint8_t*, kNumMatrices> data_, scales_;
};

}  // namespace jaxmoe

#endif  // JAXMOE_MOE_EXPERT_WEIGHTS_H_

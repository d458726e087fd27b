// The arithmetic of linear attention by the gated delta rule, one table an instruction set. Plain
// structs only: this header is included by files with instruction-set flags (see
// kernels/isa_tables.h for the rule).
#ifndef JAXMOE_ATTENTION_GATED_DELTA_KERNELS_H_
#define JAXMOE_ATTENTION_GATED_DELTA_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace jaxmoe {

// Key and value dimensions and a slice of channels are multiples of this, so that every instruction
// set has whole vectors.
inline constexpr int64_t kDeltaLanes = 16;
// Columns of a head's state that go through a step's tokens together: with 128 rows 16 KiB, half of
// a first-level cache.
inline constexpr int64_t kDeltaColumns = 32;
inline constexpr int64_t kMostConvWidth = 8;

// Channels [begin, end) of one token's convolution: out[c] = silu(sum over w of inputs[w][c] *
// weight[w * weight_ld + c]), oldest token first.
struct ConvCall {
  const float* inputs[kMostConvWidth] = {};
  int64_t width = 0;
  const float* weight = nullptr;
  int64_t weight_ld = 0;
  int64_t begin = 0, end = 0;
  float* out = nullptr;
};

// Some tokens of one sequence on some columns of one head's state.
struct DeltaCall {
  float* block = nullptr;  // [key_dim, columns], updated
  int64_t key_dim = 0;
  int64_t columns = 0;  // at most kDeltaColumns, a multiple of kDeltaLanes
  int64_t num_tokens = 0;
  // Of the first token, and how far the next one's lie.
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;  // [columns]
  int64_t stride = 0;
  const float* decay = nullptr;
  const float* rate = nullptr;
  int64_t scalar_stride = 0;
  float* out = nullptr;  // [columns]
  int64_t out_stride = 0;
};

struct GatedDeltaKernels {
  const char* name;
  void (*convolve)(const ConvCall& call);
  // x[0, n) becomes x / sqrt(sum of squares + eps) * scale.
  void (*normalize)(float* x, int64_t n, float eps, float scale);
  void (*update)(const DeltaCall& call);
};

const GatedDeltaKernels& gated_delta_kernels(Isa isa);

namespace attention_isa {
GatedDeltaKernels scalar_delta_kernels();
GatedDeltaKernels avx2_delta_kernels();
GatedDeltaKernels avx512_delta_kernels();
}  // namespace attention_isa

}  // namespace jaxmoe

#endif  // JAXMOE_ATTENTION_GATED_DELTA_KERNELS_H_

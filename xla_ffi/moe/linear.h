// y = x Wᵀ for stored weights, one map or one per head, any number of rows, on the pool.
#ifndef JAXMOE_MOE_LINEAR_H_
#define JAXMOE_MOE_LINEAR_H_

#include <cstdint>

#include "kernels/kernels.h"
#include "runtime/cpu_runtime.h"
#include "runtime/status.h"

namespace jaxmoe {

// Strides in elements unless named otherwise. One group: an ordinary linear map.
struct LinearCall {
  Family family = Family::kVector;
  WeightView weight;  // of group 0
  int64_t groups = 1;
  int64_t weight_group_bytes = 0;
  int64_t scale_group_bytes = 0;

  ActivationType x_type = ActivationType::kBf16;
  const void* x = nullptr;  // [m, groups, k]
  int64_t m = 0;
  int64_t ldx = 0;

  ActivationType y_type = ActivationType::kBf16;
  void* y = nullptr;  // [m, groups, n]
  int64_t ldy = 0;
};

Status linear(CpuRuntime& runtime, const LinearCall& call);

}  // namespace jaxmoe

#endif  // JAXMOE_MOE_LINEAR_H_

// Element-wise passes between the matrix products. Compiled for the baseline once, so every
// instruction set gives the same bits; they touch a thousandth of the bytes the products do.
#ifndef JAXMOE_MOE_ELEMENTWISE_H_
#define JAXMOE_MOE_ELEMENTWISE_H_

#include <cstdint>

namespace jaxmoe {

// h[i] = silu(gate[i]) * up[i]; NaN in, NaN out.
void swiglu(const float* gate, const float* up, int64_t n, float* h);
struct Clamped {
  float alpha, limit, up_offset;
};

// h[i] = (u + up_offset) * g * sigmoid(alpha * g), where g is gate[i], at most `limit`, and u is
// up[i] between -limit and limit; NaN in, NaN out. gpt-oss adds 1 to u, DeepSeek-V4 nothing.
void swiglu_clamped(const float* gate, const float* up, int64_t n, Clamped by, float* h);
// y[i] += weight * x[i], each product rounded before it is added.
void add_scaled(const float* x, float weight, int64_t n, float* y);

}  // namespace jaxmoe

#endif  // JAXMOE_MOE_ELEMENTWISE_H_

// Element-wise passes between the matrix products. Compiled for the baseline once, so every
// instruction set gives the same bits; they touch a thousandth of the bytes the products do.
#ifndef JAXMOE_MOE_ELEMENTWISE_H_
#define JAXMOE_MOE_ELEMENTWISE_H_

#include <cstdint>

namespace jaxmoe {

// h[i] = silu(gate[i]) * up[i]; NaN in, NaN out.
void swiglu(const float* gate, const float* up, int64_t n, float* h);
// As gpt-oss has it: h[i] = (u + 1) * g * sigmoid(alpha * g), where g is gate[i], at most `limit`,
// and u is up[i] between -limit and limit; NaN in, NaN out.
void swiglu_clamped(const float* gate, const float* up, int64_t n, float alpha, float limit,
                    float* h);
// y[i] += weight * x[i], each product rounded before it is added.
void add_scaled(const float* x, float weight, int64_t n, float* y);

}  // namespace jaxmoe

#endif  // JAXMOE_MOE_ELEMENTWISE_H_

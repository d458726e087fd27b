#include "moe/elementwise.h"

#include <bit>

namespace jaxmoe {
namespace {

// exp without branches, so that the loop vectorises: 2^round(x / ln 2) times a polynomial on the
// rest (Cephes' expf); within 2 ulp up to 88.3, infinity beyond, never below e^-87.
inline float exp_clamped(float x) {
  x = x < 89.0f ? x : 89.0f;
  x = x > -87.0f ? x : -87.0f;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - 0x4B400000;
  return p * std::bit_cast<float>((exponent + 127) << 23);
}

}  // namespace

void swiglu(const float* gate, const float* up, int64_t n, float* h) {
  for (int64_t i = 0; i < n; ++i) {
    h[i] = gate[i] / (1.0f + exp_clamped(-gate[i])) * up[i];
  }
}

void swiglu_clamped(const float* gate, const float* up, int64_t n, Clamped by, float* h) {
  const float limit = by.limit;
  for (int64_t i = 0; i < n; ++i) {
    const float g = gate[i] > limit ? limit : gate[i];
    const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
    h[i] = g / (1.0f + exp_clamped(-by.alpha * g)) * (u + by.up_offset);
  }
}

void add_scaled(const float* x, float weight, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += weight * x[i];
}

}  // namespace jaxmoe

// Conversions between FP32 and BF16 arrays, for files compiled for the baseline.
#ifndef JAXMOE_RUNTIME_BF16_H_
#define JAXMOE_RUNTIME_BF16_H_

#include <bit>
#include <cstdint>

namespace jaxmoe {

// Round to nearest even; NaN stays NaN.
inline void round_to_bf16(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const uint32_t quiet_nan = bits >> 16 | 0x40;
    y[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet_nan : rounded);
  }
}

inline void widen_bf16(const uint16_t* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = std::bit_cast<float>(static_cast<uint32_t>(x[i]) << 16);
}

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_BF16_H_

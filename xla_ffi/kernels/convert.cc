// Scalar conversions of the public header, compiled for the baseline.
#include <bit>

#include "kernels/kernels.h"

namespace jaxmoe {
namespace {
#include "kernels/fp8_e4m3.inl"
}  // namespace

float fp8_e4m3_to_float(uint8_t code) { return std::bit_cast<float>(fp8_e4m3_bits(code)); }

float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

uint16_t float_to_bf16(float value) { return bf16_round_bits(std::bit_cast<uint32_t>(value)); }

}  // namespace jaxmoe

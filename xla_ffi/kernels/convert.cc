// Scalar conversions of the public header, compiled for the baseline.
#include <bit>

#include "kernels/kernels.h"

namespace jaxmoe {
namespace {
#include "kernels/format_bits.inl"
}  // namespace

float fp8_e4m3_to_float(uint8_t code) { return std::bit_cast<float>(fp8_e4m3_bits(code)); }

float fp4_e2m1_to_float(uint8_t code) { return std::bit_cast<float>(fp4_e2m1_bits(code & 15u)); }

float e8m0_to_float(uint8_t code) {
  return std::bit_cast<float>(code == 255 ? 0x7FC00000u : e8m0_bits(code));
}

float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

uint16_t float_to_bf16(float value) { return bf16_round_bits(std::bit_cast<uint32_t>(value)); }

}  // namespace jaxmoe

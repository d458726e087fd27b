// Bit patterns of small floating-point formats as constant expressions. Included inside a namespace
// of each translation unit (see isa_tables.h for why); no standard function is called here.

// Bits of the FP32 value of an OCP E4M3FN code. 0x7F and 0xFF are NaN, the format has no infinity.
constexpr uint32_t fp8_e4m3_bits(uint32_t code) {
  const uint32_t sign = (code & 0x80u) << 24;
  const uint32_t exponent = (code >> 3) & 15u;
  const uint32_t mantissa = code & 7u;
  if ((code & 0x7Fu) == 0x7Fu) return sign | 0x7FC00000u;
  if (exponent != 0) return sign | ((exponent + 120u) << 23) | (mantissa << 20);
  if (mantissa == 0) return sign;
  // Subnormal: mantissa * 2^-9, normalised.
  if (mantissa >= 4) return sign | (120u << 23) | ((mantissa & 3u) << 21);
  if (mantissa >= 2) return sign | (119u << 23) | ((mantissa & 1u) << 22);
  return sign | (118u << 23);
}

// Bits of the FP32 value of an OCP E2M1 code: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
constexpr uint32_t fp4_e2m1_bits(uint32_t code) {
  const uint32_t sign = (code & 8u) << 28;
  const uint32_t exponent = (code >> 1) & 3u;
  const uint32_t mantissa = code & 1u;
  if (exponent != 0) return sign | ((exponent + 126u) << 23) | (mantissa << 22);
  return mantissa == 0 ? sign : sign | (126u << 23);
}

// Bits of 2^(code - 127); code 0 gives a subnormal. 255, which has no such value, gives infinity.
constexpr uint32_t e8m0_bits(uint32_t code) { return code == 0 ? 1u << 22 : code << 23; }

// Bits of the FP32 value of (nibble - 8).
constexpr uint32_t int4_bits(uint32_t nibble) {
  return __builtin_bit_cast(uint32_t, static_cast<float>(static_cast<int>(nibble) - 8));
}

// What a word of a scale and a zero point (ScaleType::kF32Zero) says.
constexpr uint32_t kZeroMask = 31;
constexpr uint32_t scale_of_word(uint32_t word) { return word & ~kZeroMask; }
constexpr int zero_of_word(uint32_t word) { return static_cast<int>(word & kZeroMask); }

constexpr uint16_t bf16_round_bits(uint32_t float_bits) {
  if ((float_bits & 0x7FFFFFFFu) > 0x7F800000u) {
    return static_cast<uint16_t>((float_bits >> 16) | 0x40u);  // quiet NaN, payload's top bits kept
  }
  return static_cast<uint16_t>((float_bits + 0x7FFFu + ((float_bits >> 16) & 1u)) >> 16);
}

// Column (of a block) at position i of FP8 weights expanded to BF16 by fp8_to_bf16: of each 64
// columns the first vector holds 0-7, 16-23, 32-39, 48-55 and the second the rest. Prepared
// activations follow the same order.
constexpr int fp8_bf16_column(int i) {
  const int lane = i % 32 / 8;
  const int second = i % 64 / 32;
  return i / 64 * 64 + lane * 16 + second * 8 + i % 8;
}

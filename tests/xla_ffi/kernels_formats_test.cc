// Every code of every format reaches the output exactly, on every instruction set and family.
#include <bit>
#include <thread>

#include "check.h"
#include "kernels_fixture.h"
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

using namespace jaxmoe_test;

namespace {

bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

// E4M3FN straight from its definition, in double arithmetic.
float fp8_by_definition(int code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  if ((code & 0x7F) == 0x7F) return NAN;
  const double magnitude =
      exponent == 0 ? mantissa * 0x1p-9 : std::ldexp(1.0 + mantissa / 8.0, exponent - 7);
  return static_cast<float>(code & 0x80 ? -magnitude : magnitude);
}

float value_by_definition(WeightFormat format, int code) {
  if (format_info(format).bits == 8) return fp8_by_definition(code);
  if (format != WeightFormat::kMxfp4) return static_cast<float>(code) - 8.0f;
  constexpr float kMagnitude[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  return code & 8 ? -kMagnitude[code & 7] : kMagnitude[code & 7];
}

// Row `code` holds that code in one column, met by x there = 1; elsewhere weights of
// zero meet random x. Sums start at +0, so a weight of -0 gives +0.
void check_codes(const MatmulKernel& kernel, WeightFormat format, int64_t columns, int64_t column,
                 int64_t m, float scale) {
  const int64_t k = padded_columns(format, columns);
  const int codes = 1 << format_info(format).bits;
  Weights weights(format, codes, k);
  weights.set_scales(scale);
  if (format == WeightFormat::kInt4G32 || format == WeightFormat::kInt4G128) {
    weights.bytes.assign(weights.bytes.size(), 0x88);
  }
  for (int code = 0; code < codes; ++code) weights.set_bits(code, column, code);
  Activations x(m, k, 3);
  for (int64_t i = 0; i < m; ++i) x.set(i, column, 1.0f);
  const std::vector<float> y = run(kernel, weights.view(), 0, codes, x, iota(m));
  for (int64_t i = 0; i < m; ++i) {
    for (int code = 0; code < codes; ++code) {
      const float want = 0.0f + value_by_definition(format, code) * scale;
      const float got = y[i * codes + code];
      JAXMOE_CHECK(same(got, want), "%s code 0x%02X k %d column %d m %d: got %g (0x%08X), want %g",
                   kernel.name, code, static_cast<int>(k), static_cast<int>(column),
                   static_cast<int>(m), got, std::bit_cast<uint32_t>(got), want);
    }
  }
}

}  // namespace

JAXMOE_TEST(fp8_to_float_follows_the_definition) {
  for (int code = 0; code < 256; ++code) {
    JAXMOE_CHECK(same(fp8_e4m3_to_float(static_cast<uint8_t>(code)), fp8_by_definition(code)),
                 "0x%02X", code);
  }
}

JAXMOE_TEST(bf16_rounds_to_nearest_even) {
  const struct {
    uint32_t f32;
    uint16_t bf16;
  } cases[] = {{0x3F800000, 0x3F80}, {0x3F808000, 0x3F80}, {0x3F818000, 0x3F82},
               {0x3F808001, 0x3F81}, {0x7F7FFFFF, 0x7F80}, {0x7F800000, 0x7F80},
               {0x80000000, 0x8000}, {0x00018000, 0x0002}, {0x00000001, 0x0000}};
  for (const auto& c : cases) {
    JAXMOE_CHECK(float_to_bf16(std::bit_cast<float>(c.f32)) == c.bf16, "0x%08X", c.f32);
  }
  JAXMOE_CHECK(std::isnan(bf16_to_float(float_to_bf16(std::bit_cast<float>(0x7F800001u)))));
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = bf16_to_float(static_cast<uint16_t>(bits));
    if (!std::isnan(value)) JAXMOE_CHECK(float_to_bf16(value) == bits, "0x%04X", bits);
  }
}

JAXMOE_TEST(fp4_and_e8m0_to_float_follow_the_definition) {
  for (int code = 0; code < 16; ++code) {
    const float want = value_by_definition(WeightFormat::kMxfp4, code);
    JAXMOE_CHECK(same(fp4_e2m1_to_float(static_cast<uint8_t>(code)), want), "0x%X", code);
  }
  for (int code = 0; code < 255; ++code) {
    const float want = static_cast<float>(std::ldexp(1.0, code - 127));
    JAXMOE_CHECK(same(e8m0_to_float(static_cast<uint8_t>(code)), want), "%d", code);
  }
  JAXMOE_CHECK(std::isnan(e8m0_to_float(255)));
}

JAXMOE_TEST(every_code_is_exact_in_every_kernel) {
  for_each_kernel([](const MatmulKernel& kernel, Family, WeightFormat format) {
    if (format_info(format).bits > 8) return;
    // Every column of a block once (a decoder may treat lanes differently), then a tail, then more
    // rows.
    for (int64_t column = 0; column < 128; ++column) {
      check_codes(kernel, format, 128, column, 1, 1.0f);
    }
    check_codes(kernel, format, 32, 31, 1, 0.25f);
    check_codes(kernel, format, 300, 290, 1, 0.125f);
    check_codes(kernel, format, 300, 140, 2, 0.125f);
    check_codes(kernel, format, 129, 128, 5, 2.0f);
    check_codes(kernel, format, 256, 77, 19, 1.0f);
  });
}

// Each row has one weight that is not zero, in each group in turn, and other scales everywhere: the
// output is that weight times its own scale. All scales of a byte, 16 bits' in steps.
JAXMOE_TEST(every_scale_is_exact_in_every_kernel) {
  for_each_kernel([](const MatmulKernel& kernel, Family, WeightFormat format) {
    const FormatInfo& info = format_info(format);
    if (!info.scaled_by_group()) return;
    const bool bytes = info.scale_type == ScaleType::kE8m0;
    const int64_t rows = bytes ? 255 : 256, k = padded_columns(format, 5 * 32);
    // Codes of the least and greatest magnitudes there are, and one between.
    const std::vector<int> codes = info.bits == 8 ? std::vector<int>{0x01, 0xFE, 0x38}
                                   : bytes        ? std::vector<int>{0x1, 0xF, 0x3}
                                                  : std::vector<int>{0x0, 0xF, 0x9};
    for (int64_t m : {1, 2, 5}) {
      for (int64_t group = 0; group < k / info.group_cols; ++group) {
        const int code = codes[static_cast<size_t>(group) % codes.size()];
        Weights weights(format, rows, k);
        if (!bytes) weights.bytes.assign(weights.bytes.size(), 0x88);
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t g = 0; g < weights.scale_cols(); ++g) {
            const int64_t at = row * weights.scale_cols() + g;
            if (bytes) {
              weights.scale[at] = static_cast<uint8_t>((row + 37 * (g + 8 - group)) % 255);
              if (g == group) weights.scale[at] = static_cast<uint8_t>(row);
            } else {
              // Every exponent but infinity's, signs and mantissas with it.
              const uint16_t bits = static_cast<uint16_t>((row + g + 8 - group) % 255 << 7 |
                                                          (row * 29 + g) % 128 | (row & 1) << 15);
              std::memcpy(&weights.scale[2 * at], &bits, 2);
            }
          }
          weights.set_bits(row, group * info.group_cols + row % info.group_cols, code);
        }
        Activations x(m, k);
        x.fill(1.0f);
        const std::vector<float> y = run(kernel, weights.view(), 0, rows, x, iota(m));
        for (int64_t i = 0; i < m * rows; ++i) {
          const int64_t row = i % rows, column = group * info.group_cols + row % info.group_cols;
          // Rounded once, where it is no FP32 number (a subnormal's last bits), or infinite.
          const float want = 0.0f + static_cast<float>(weights.value(row, column));
          JAXMOE_CHECK(same(y[i], want), "%s row %d group %d: got %g, want %g", kernel.name,
                       static_cast<int>(row), static_cast<int>(group), y[i], want);
        }
      }
    }
  });
}

// BF16: each of the 65536 patterns; kernels that multiply in BF16 may flush subnormals, nothing
// else.
JAXMOE_TEST(every_bf16_pattern_is_exact) {
  for_each_kernel([](const MatmulKernel& kernel, Family family, WeightFormat format) {
    if (format != WeightFormat::kBf16) return;
    const bool flushes = family != Family::kVector && multiplies_bf16(kernel);
    constexpr int64_t kRows = 65536;
    for (int64_t m : {1, 3}) {
      Weights weights(format, kRows, 2);
      for (int64_t row = 0; row < kRows; ++row)
        weights.set_bits(row, row & 1, static_cast<uint32_t>(row));
      Activations x(m, 2);
      x.fill(1.0f);
      const std::vector<float> y = run(kernel, weights.view(), 0, kRows, x, iota(m));
      for (int64_t i = 0; i < m * kRows; ++i) {
        const uint16_t pattern = static_cast<uint16_t>(i % kRows);
        float want = 0.0f + bf16_to_float(pattern);
        const bool subnormal = (pattern & 0x7F80) == 0;
        if (flushes && subnormal && y[i] == 0.0f) continue;
        JAXMOE_CHECK(same(y[i], want), "%s 0x%04X: got %g, want %g", kernel.name, pattern, y[i],
                     want);
      }
    }
  });
}

JAXMOE_TEST(f32_special_values_are_exact) {
  const float values[] = {0.0f, 1e-45f, -1e-40f, 3.4e38f, INFINITY, -INFINITY, NAN, -1.5f};
  for_each_kernel([&](const MatmulKernel& kernel, Family, WeightFormat format) {
    if (format != WeightFormat::kF32) return;
    for (int64_t column = 0; column < 130; column += 43) {
      Weights weights(format, 8, 130);
      for (int row = 0; row < 8; ++row) weights.set(row, column, values[row]);
      Activations x(1, 130);
      x.fill(1.0f);
      const std::vector<float> y = run(kernel, weights.view(), 0, 8, x, {0}, ActivationType::kF32);
      for (int row = 0; row < 8; ++row)
        JAXMOE_CHECK(same(y[row], 0.0f + values[row]), "%g", values[row]);
    }
  });
}

// A caller's thread may flush subnormals (XLA's do): results must not depend on it, nor its mode be
// changed.
JAXMOE_TEST(caller_flush_mode_changes_nothing) {
  for_each_kernel([](const MatmulKernel& kernel, Family, WeightFormat format) {
    const int64_t k = padded_columns(format, 200);
    Weights weights(format, 5, k);
    weights.randomize(4);
    // One row of nothing but subnormals, whose sum a flushing multiply would turn to zero.
    if (!format_info(format).scaled()) {
      for (int64_t col = 0; col < k; ++col) weights.set_bits(2, col, 0x70);
    } else if (format_info(format).scaled_by_group()) {
      for (int64_t i = 0; i < weights.scale_cols(); ++i) {
        weights.set_scale(2 * weights.scale_cols() + i, 0x1p-127f);
      }
    }
    Activations x(3, k);
    for (int64_t m : {1, 3}) {
      const std::vector<float> plain = run(kernel, weights.view(), 0, 5, x, iota(m));
      const unsigned saved = _mm_getcsr();
      _mm_setcsr(saved | 0x8040);
      const std::vector<float> flushed = run(kernel, weights.view(), 0, 5, x, iota(m));
      JAXMOE_CHECK((_mm_getcsr() & 0x8040) == 0x8040, "%s", kernel.name);
      _mm_setcsr(saved);
      JAXMOE_CHECK(std::memcmp(plain.data(), flushed.data(), plain.size() * 4) == 0, "%s",
                   kernel.name);
    }
  });
}

JAXMOE_TEST_MAIN

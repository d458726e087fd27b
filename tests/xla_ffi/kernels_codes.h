// Every code and every scale of a format, alone on its way to an output, through one kernel.
#ifndef JAXMOE_TESTS_KERNELS_CODES_H_
#define JAXMOE_TESTS_KERNELS_CODES_H_

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "kernels_fixture.h"

namespace jaxmoe_test {

inline bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

// E4M3FN straight from its definition, in double arithmetic.
inline float fp8_by_definition(int code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  if ((code & 0x7F) == 0x7F) return NAN;
  const double magnitude =
      exponent == 0 ? mantissa * 0x1p-9 : std::ldexp(1.0 + mantissa / 8.0, exponent - 7);
  return static_cast<float>(code & 0x80 ? -magnitude : magnitude);
}

inline float value_by_definition(WeightFormat format, int code) {
  if (format_info(format).bits == 8) return fp8_by_definition(code);
  const bool is_fp4 = format == WeightFormat::kMxfp4 || format == WeightFormat::kNvfp4;
  if (!is_fp4) return static_cast<float>(code) - 8.0f;
  constexpr float kMagnitude[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  return code & 8 ? -kMagnitude[code & 7] : kMagnitude[code & 7];
}

// Row `code` holds that code in one column, met by x there = 1; elsewhere weights of
// zero meet random x. Sums start at +0, so a weight of -0 gives +0. zero: the column's group's zero
// point, where the format has any.
inline void check_codes(const MatmulKernel& kernel, WeightFormat format, int64_t columns,
                        int64_t column, int64_t m, float scale, int zero = 8) {
  const int64_t k = padded_columns(format, columns);
  const int codes = 1 << format_info(format).bits;
  Weights weights(format, codes, k);
  weights.set_scales(scale);
  if (format == WeightFormat::kInt4G32 || format == WeightFormat::kInt4G128 ||
      weights.has_zeros()) {
    weights.bytes.assign(weights.bytes.size(), 0x88);
  }
  const int64_t group = format_info(format).group_cols;
  for (int row = 0; weights.has_zeros() && row < codes; ++row) {
    weights.set_zero(row * weights.scale_cols() + column / group, static_cast<uint32_t>(zero));
  }
  for (int code = 0; code < codes; ++code) weights.set_bits(code, column, code);
  Activations x(m, k, 3);
  for (int64_t i = 0; i < m; ++i) {
    // No code stands for a weight of zero if the zero point is 16.
    for (int64_t col = 0; weights.has_zeros() && col < k; ++col) {
      if (col / group == column / group) x.set(i, col, 0.0f);
    }
    x.set(i, column, 1.0f);
  }
  const std::vector<float> y = run(kernel, weights.view(), 0, codes, x, iota(m));
  for (int64_t i = 0; i < m; ++i) {
    for (int code = 0; code < codes; ++code) {
      const float value = value_by_definition(format, code) + static_cast<float>(8 - zero);
      const float want = 0.0f + value * scale;
      const float got = y[i * codes + code];
      JAXMOE_CHECK(same(got, want), "%s code 0x%02X k %d column %d m %d: got %g (0x%08X), want %g",
                   kernel.name, code, static_cast<int>(k), static_cast<int>(column),
                   static_cast<int>(m), got, std::bit_cast<uint32_t>(got), want);
    }
  }
}

inline void check_every_code(const MatmulKernel& kernel, WeightFormat format) {
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
  if (format_info(format).scale_type != ScaleType::kF32Zero) return;
  for (int zero = 0; zero <= 16; ++zero) {
    for (int64_t column = 0; column < 128; column += 9) {
      for (int64_t m : {1, 2, 5}) check_codes(kernel, format, 160, column, m, 0.5f, zero);
    }
  }
}

// Each row has one weight that is not zero, in each group in turn, and other scales everywhere: the
// output is that weight times its own scale. All scales of a byte, wider ones' in steps.
inline void check_every_scale(const MatmulKernel& kernel, WeightFormat format) {
  const FormatInfo& info = format_info(format);
  if (!info.scaled_by_group()) return;
  const bool e4m3 = info.scale_type == ScaleType::kE4m3;
  const bool bytes = info.scale_type == ScaleType::kE8m0 || e4m3;
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
            uint8_t byte = static_cast<uint8_t>((row + 37 * (g + 8 - group)) % 255);
            if (g == group) byte = static_cast<uint8_t>(row);
            if (e4m3 && (byte & 127) == 127) byte = 0x81;
            *weights.scale_at(at) = byte;
          } else if (weights.has_zeros()) {
            // All of FP16's, in steps, as FP32; the zero point is the other weights' code.
            const float step = static_cast<float>(1024 + (row * 37 + g * 11) % 1024);
            const float sign = row & 1 ? -1.0f : 1.0f;
            weights.set_scale(at, std::ldexp(sign * step, static_cast<int>(row + g) % 30 - 24));
            weights.set_zero(at, 8);
          } else {
            // Every exponent but infinity's, signs and mantissas with it.
            const uint16_t bits = static_cast<uint16_t>((row + g + 8 - group) % 255 << 7 |
                                                        (row * 29 + g) % 128 | (row & 1) << 15);
            std::memcpy(&weights.scale[2 * at], &bits, 2);
          }
        }
        weights.set_bits(row, group * info.group_cols + row % info.group_cols, code);
        weights.set_factor(row, std::ldexp(1.0f, static_cast<int>(row % 64) - 32));
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
}

}  // namespace jaxmoe_test

#endif  // JAXMOE_TESTS_KERNELS_CODES_H_

// Every code of every format reaches the output exactly, on every instruction set and family.
#include <bit>
#include <thread>

#include "check.h"
#include "kernels_codes.h"
#include "kernels_fixture.h"
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

using namespace jaxmoe_test;

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
    check_every_code(kernel, format);
  });
}

JAXMOE_TEST(every_scale_is_exact_in_every_kernel) {
  for_each_kernel([](const MatmulKernel& kernel, Family, WeightFormat format) {
    check_every_scale(kernel, format);
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

// Random weights in every stored format, a double oracle, and one way to run a kernel as the
// runtime does.
#ifndef JAXMOE_TESTS_KERNELS_FIXTURE_H_
#define JAXMOE_TESTS_KERNELS_FIXTURE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/formats.h"
#include "kernels/isa_tables.h"
#include "kernels/kernels.h"

namespace jaxmoe_test {

using namespace jaxmoe;

// In the order of the enumeration.
inline constexpr WeightFormat kFormats[] = {
    WeightFormat::kF32,        WeightFormat::kBf16,    WeightFormat::kFp8Block,
    WeightFormat::kFp8Channel, WeightFormat::kInt4G32, WeightFormat::kInt4G128,
    WeightFormat::kMxfp4,      WeightFormat::kMxfp8,   WeightFormat::kUint4G32,
    WeightFormat::kUint4G128,  WeightFormat::kNvfp4};
inline constexpr Family kFamilies[] = {Family::kVector, Family::kMatrix, Family::kVectorBf16};

inline constexpr isa_tables::Traits kTraits[] = {{.one_stream = false, .fast_bf16_dot = false},
                                                 {.one_stream = true, .fast_bf16_dot = true}};

// Columns from k on that the format can have.
inline int64_t padded_columns(WeightFormat format, int64_t k) {
  const FormatInfo& info = format_info(format);
  return info.whole_groups ? (k + info.group_cols - 1) / info.group_cols * info.group_cols : k;
}

inline const char* family_name(Family family) {
  return family == Family::kMatrix ? "matrix"
                                   : (family == Family::kVector ? "vector" : "vector_bf16");
}

// Whether activations (and, between an expert's stages, hidden ones) are rounded to BF16.
inline bool multiplies_bf16(const MatmulKernel& kernel) {
  return std::strstr(kernel.name, "_f32") == nullptr;
}

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint32_t bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
  float uniform() { return static_cast<float>(bits() >> 8) * 0x1p-23f - 1.0f; }  // [-1, 1)
};

// Rows of `k` weights, `pad_bytes` between rows, held at the front of a buffer without slack.
struct Weights {
  WeightFormat format;
  int64_t n, k, stride;
  std::vector<uint8_t> bytes;
  std::vector<uint8_t> scale;  // all ones until set

  Weights(WeightFormat format, int64_t n, int64_t k, int64_t pad_bytes = 0)
      : format(format),
        n(n),
        k(k),
        stride(weight_row_bytes(format, k) + pad_bytes),
        bytes((n - 1) * stride + weight_row_bytes(format, k)),
        scale(scale_rows() * scale_stride() * scale_bytes(info().scale_type)) {
    set_scales(1.0f);
    for (int64_t row = 0; row < n; ++row) set_factor(row, 1.0f);
    set_zeros(8);
  }

  const FormatInfo& info() const { return format_info(format); }
  int64_t scale_rows() const { return scale_dims(format, n, k).first; }
  int64_t scale_stride() const { return scale_dims(format, n, k).second; }
  int64_t scale_cols() const { return scale_stride() - info().tail_cols; }
  int64_t num_scales() const { return scale_rows() * scale_cols(); }

  // Scale i of those that belong to groups.
  uint8_t* scale_at(int64_t i) {
    const int64_t at = i / scale_cols() * scale_stride() + i % scale_cols();
    return &scale[at * scale_bytes(info().scale_type)];
  }
  const uint8_t* scale_at(int64_t i) const { return const_cast<Weights*>(this)->scale_at(i); }
  bool has_zeros() const { return info().scale_type == ScaleType::kF32Zero; }
  void set_zero(int64_t i, uint32_t zero) {
    uint8_t* at = scale_at(i);
    *at = static_cast<uint8_t>((*at & 0xE0u) | zero);
  }
  void set_zeros(uint32_t zero) {
    for (int64_t i = 0; has_zeros() && i < num_scales(); ++i) set_zero(i, zero);
  }
  // Of a row, behind the scales of its groups.
  void set_factor(int64_t row, float value) {
    if (info().tail_cols != 0) std::memcpy(&scale[(row + 1) * scale_stride() - 4], &value, 4);
  }

  // As near as the scales' type allows.
  void set_scale(int64_t i, float value) {
    if (info().scale_type == ScaleType::kF32) {
      std::memcpy(&scale[4 * i], &value, 4);
    } else if (has_zeros()) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits = (bits & ~0x1FFFu) | (*scale_at(i) & 31u);
      std::memcpy(scale_at(i), &bits, 4);
    } else if (info().scale_type == ScaleType::kE4m3) {
      const int exponent = std::min(8, std::max(-6, std::ilogb(value)));
      *scale_at(i) = static_cast<uint8_t>((exponent + 7) << 3);
    } else if (info().scale_type == ScaleType::kBf16) {
      const uint16_t bits = float_to_bf16(value);
      std::memcpy(&scale[2 * i], &bits, 2);
    } else {
      scale[i] = static_cast<uint8_t>(127 + std::ilogb(value));
    }
  }
  void set_scales(float value) {
    for (int64_t i = 0; i < num_scales(); ++i) set_scale(i, value);
  }
  float scale_of(int64_t row, int64_t col) const {
    if (!info().scaled()) return 1.0f;
    const int64_t i = row / info().group_rows * scale_cols() +
                      (info().group_cols == 0 ? 0 : col / info().group_cols);
    if (info().scale_type == ScaleType::kF32) {
      float value;
      std::memcpy(&value, &scale[4 * i], 4);
      return value;
    }
    if (has_zeros()) {
      uint32_t bits;
      std::memcpy(&bits, scale_at(i), 4);
      bits &= ~31u;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    }
    if (info().scale_type == ScaleType::kE4m3) {
      float factor;
      std::memcpy(&factor, &scale[(row + 1) * scale_stride() - 4], 4);
      return fp8_e4m3_to_float(*scale_at(i)) * factor;
    }
    if (info().scale_type == ScaleType::kBf16) {
      uint16_t bits;
      std::memcpy(&bits, &scale[2 * i], 2);
      return bf16_to_float(bits);
    }
    return e8m0_to_float(scale[i]);
  }

  void randomize(uint64_t seed) {
    Random random(seed);
    for (int64_t i = 0; i < num_scales(); ++i) {
      set_scale(i, 0.001f + std::fabs(random.uniform()) * 0.01f);
      if (has_zeros()) set_zero(i, random.bits() % 17);
      if (info().scale_type == ScaleType::kE4m3) {
        *scale_at(i) = static_cast<uint8_t>(random.bits() % 127 | (random.bits() & 128));
      }
    }
    for (int64_t row = 0; row < n; ++row) set_factor(row, 0.002f * random.uniform());
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t col = 0; col < k; ++col) {
        if (info().bits <= 8) {
          uint8_t code = static_cast<uint8_t>(random.bits());
          if ((code & 0x7F) == 0x7F) code ^= 1;
          set_bits(row, col, code);
        } else {
          set(row, col, random.uniform());
        }
      }
    }
  }

  uint8_t* at(int64_t row, int64_t col) { return &bytes[row * stride + col * info().bits / 8]; }
  const uint8_t* at(int64_t row, int64_t col) const {
    return &bytes[row * stride + col * info().bits / 8];
  }
  void set_bits(int64_t row, int64_t col, uint32_t bits) {
    uint8_t* to = at(row, col);
    if (info().bits == 4) {
      const int shift = col % 2 * 4;
      *to = static_cast<uint8_t>((*to & ~(15u << shift)) | (bits & 15u) << shift);
    } else {
      std::memcpy(to, &bits, info().bits / 8);
    }
  }
  void set(int64_t row, int64_t col, float value) {
    if (format == WeightFormat::kF32) {
      std::memcpy(at(row, col), &value, 4);
    } else {
      set_bits(row, col, float_to_bf16(value));
    }
  }
  // Without its scale.
  float code_value(int64_t row, int64_t col) const {
    switch (format) {
      case WeightFormat::kF32: {
        float out;
        std::memcpy(&out, at(row, col), 4);
        return out;
      }
      case WeightFormat::kBf16: {
        uint16_t bits;
        std::memcpy(&bits, at(row, col), 2);
        return bf16_to_float(bits);
      }
      case WeightFormat::kFp8Block:
      case WeightFormat::kFp8Channel:
      case WeightFormat::kMxfp8:
        return fp8_e4m3_to_float(*at(row, col));
      case WeightFormat::kInt4G32:
      case WeightFormat::kInt4G128:
        return static_cast<float>(*at(row, col) >> col % 2 * 4 & 15) - 8.0f;
      case WeightFormat::kUint4G32:
      case WeightFormat::kUint4G128: {
        const int zero = *scale_at(row * scale_cols() + col / info().group_cols) & 31;
        return static_cast<float>((*at(row, col) >> col % 2 * 4 & 15) - zero);
      }
      case WeightFormat::kNvfp4:
      case WeightFormat::kMxfp4:
        return fp4_e2m1_to_float(static_cast<uint8_t>(*at(row, col) >> col % 2 * 4));
    }
    return NAN;
  }
  double value(int64_t row, int64_t col) const {
    return static_cast<double>(code_value(row, col)) * scale_of(row, col);
  }
  WeightView view(const uint8_t* data = nullptr) const {
    WeightView w;
    w.data = data != nullptr ? data : bytes.data();
    w.scale = scale.empty() ? nullptr : scale.data();
    w.n = n;
    w.k = k;
    w.row_stride_bytes = stride;
    w.scale_stride = scale_stride();
    w.format = format;
    return w;
  }
};

struct AlignedDelete {
  void operator()(void* p) const { std::free(p); }
};

inline std::unique_ptr<void, AlignedDelete> aligned_bytes(size_t bytes) {
  return std::unique_ptr<void, AlignedDelete>(std::aligned_alloc(64, (bytes + 64) / 64 * 64));
}

// Activations as BF16 values kept in both types, so that either `prepare` reads the same numbers.
struct Activations {
  int64_t rows, k, ld;
  std::vector<float> f32;
  std::vector<uint16_t> bf16;

  Activations(int64_t rows, int64_t k, uint64_t seed = 1, int64_t pad = 0)
      : rows(rows), k(k), ld(k + pad), f32(rows * ld, NAN), bf16(rows * ld, 0x7FC0) {
    Random random(seed);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < k; ++col) set(row, col, random.uniform());
    }
  }
  void set(int64_t row, int64_t col, float value) {
    bf16[row * ld + col] = float_to_bf16(value);
    f32[row * ld + col] = bf16_to_float(bf16[row * ld + col]);
  }
  void fill(float value) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < k; ++col) set(row, col, value);
    }
  }
};

// Prepares all rows of x (one call a row, as several workers would), gathers row_ids, multiplies.
// Returns y [m, n_end - n_begin].
inline std::vector<float> run(const MatmulKernel& kernel, const WeightView& w, int64_t n_begin,
                              int64_t n_end, const Activations& x,
                              const std::vector<int32_t>& row_ids,
                              ActivationType type = ActivationType::kBf16) {
  const int64_t m = static_cast<int64_t>(row_ids.size());
  auto prepared = aligned_bytes(kernel.prepared_row_bytes(x.k) * x.rows);
  for (int64_t row = 0; row < x.rows; ++row) {
    kernel.prepare(type,
                   type == ActivationType::kF32 ? static_cast<const void*>(x.f32.data())
                                                : static_cast<const void*>(x.bf16.data()),
                   x.ld, x.k, row, row + 1, prepared.get());
  }
  std::vector<float> y(m * (n_end - n_begin), -12345.0f);
  if (kernel.panel_bytes != nullptr) {
    auto panel = aligned_bytes(kernel.panel_bytes(m, x.k));
    kernel.make_panel(prepared.get(), x.k, row_ids.data(), m, panel.get());
    kernel.matmul(w, n_begin, n_end, panel.get(), nullptr, m, y.data(), n_end - n_begin);
  } else {
    kernel.matmul(w, n_begin, n_end, prepared.get(), row_ids.data(), m, y.data(), n_end - n_begin);
  }
  return y;
}

inline std::vector<int32_t> iota(int64_t m) {
  std::vector<int32_t> ids(m);
  for (int64_t i = 0; i < m; ++i) ids[i] = static_cast<int32_t>(i);
  return ids;
}

// Runs body(kernel, family, format) for every entry of every table this machine can run, whatever
// its vendor; says which.
template <class Body>
void for_each_kernel(Body body) {
  for (int i = 0; i < kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_supported(isa)) continue;
    kernel_thread_init(isa);
    std::printf("  [%s]", isa_name(isa));
    for (const isa_tables::Traits traits : kTraits) {
      const KernelTable table = isa_tables::make_table(isa, traits);
      for (Family family : kFamilies) {
        for (WeightFormat format : kFormats) {
          body(table.matmul[static_cast<int>(family)][static_cast<int>(format)], family, format);
        }
      }
    }
    kernel_thread_release(isa);
  }
  std::printf("\n");
}

}  // namespace jaxmoe_test

#endif  // JAXMOE_TESTS_KERNELS_FIXTURE_H_

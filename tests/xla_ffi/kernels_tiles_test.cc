// The tile algorithm (blocking, panels, tails, scales) on emulated tiles, so that it is checked on
// machines that have none. The instructions themselves are checked by the other kernels_* tests
// where AMX is supported.
#include <xmmintrin.h>

#include <bit>

#include "check.h"
#include "kernels_codes.h"
#include "kernels_fixture.h"

namespace jaxmoe {
namespace {

#include "kernels/format_bits.inl"
#include "kernels/matmul_common.inl"
#include "kernels/matmul_tiles.inl"

// Eight tiles of 16 rows of 64 bytes, one set a thread.
struct EmulatedTiles {
  static inline thread_local uint32_t tile[8][kTile][kTile];

  template <int T>
  static void zero() {
    std::memset(tile[T], 0, sizeof(tile[T]));
  }
  template <int T>
  static void load(const void* base, int64_t stride) {
    for (int row = 0; row < kTile; ++row) {
      std::memcpy(tile[T][row], static_cast<const char*>(base) + row * stride, 64);
    }
  }
  template <int T>
  static void store(void* base, int64_t stride) {
    for (int row = 0; row < kTile; ++row) {
      std::memcpy(static_cast<char*>(base) + row * stride, tile[T][row], 64);
    }
  }
  // TDPBF16PS: C[i][j] += A[i][2p] B[p][2j] + A[i][2p + 1] B[p][2j + 1], subnormal inputs as zero.
  template <int C, int A, int B>
  static void dot() {
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kTile; ++j) {
        float sum = std::bit_cast<float>(tile[C][i][j]);
        for (int p = 0; p < kTile; ++p) {
          sum += half(tile[A][i][p], 0) * half(tile[B][p][j], 0);
          sum += half(tile[A][i][p], 1) * half(tile[B][p][j], 1);
        }
        tile[C][i][j] = std::bit_cast<uint32_t>(sum);
      }
    }
  }
  static float half(uint32_t word, int which) {
    const uint32_t bits = which == 0 ? word << 16 : word & 0xFFFF0000u;
    return std::bit_cast<float>((bits & 0x7F800000u) == 0 ? bits & 0x80000000u : bits);
  }
};

struct EmulatedBase {
  using Elem = uint16_t;
  using Tiles = EmulatedTiles;
  static constexpr int64_t kAheadBytes = 512;
  static constexpr bool kFolded = false;
  static constexpr int kTerms = 1;
  static void scale_row(float* sum, float scale) {
    for (int i = 0; i < kTile; ++i) sum[i] *= scale;
  }
  static void flush(float* sum, const float* part, float scale) {
    for (int i = 0; i < kTile; ++i) sum[i] = std::fma(part[i], scale, sum[i]);
  }
  static void transpose(const uint32_t* src, int64_t stride, uint32_t* dst) {
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kTile; ++j) dst[j * kTile + i] = src[i * stride + j];
    }
  }
};

struct EmulatedFp8 : EmulatedBase {
  static constexpr int kWeightBits = 8;
  static constexpr int64_t kBlockCols = 128;
  static constexpr int column(int i) { return fp8_bf16_column(i); }
  static float value(const uint8_t* row, int64_t col) {
    return std::bit_cast<float>(fp8_e4m3_bits(row[col]));
  }
};
struct EmulatedNibbles : EmulatedBase {
  static constexpr int kWeightBits = 4;
  static constexpr int64_t kBlockCols = 128;
  static constexpr int column(int i) { return nibble_tile_column(i); }
};
struct EmulatedInt4 : EmulatedNibbles {
  static float value(const uint8_t* row, int64_t col) { return nibble_value(row, col, int4_bits); }
};
struct EmulatedUint4 : EmulatedNibbles {
  static float value(const uint8_t* row, int64_t col) {
    return static_cast<float>(row[col / 2] >> col % 2 * 4 & 15);
  }
};
struct EmulatedFp4 : EmulatedNibbles {
  static float value(const uint8_t* row, int64_t col) {
    return nibble_value(row, col, fp4_e2m1_bits);
  }
};

uint16_t to_bf16(float value) { return bf16_round_bits(std::bit_cast<uint32_t>(value)); }
float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Position i of a piece of 64: in the first tile step or the second.
uint16_t* place(uint16_t* first, uint16_t* second, int i) {
  return i < 32 ? first + i : second + i - 32;
}

// Less its group's zero point, where it has one; scales are those of a piece of 64.
template <class Codes, class Scaling>
float value_of(const uint8_t* src, const uint8_t* scales, int column) {
  float value = Codes::value(src, column);
  if constexpr (Scaling::kZeros) {
    value -=
        static_cast<float>(load_zero(scales + column / Scaling::kGroupCols * Scaling::kScaleBytes));
  }
  return value;
}

template <class Codes, class Scaling>
struct Emulated : Codes, Scaling {
  static void expand(const uint8_t* src, const uint8_t* scales, uint16_t* first, uint16_t* second) {
    for (int i = 0; i < 64; ++i) {
      *place(first, second, i) = to_bf16(value_of<Codes, Scaling>(src, scales, Codes::column(i)));
    }
  }
};

template <class Codes, class Scaling, int kNumTerms>
struct EmulatedFolded : Codes, Scaling {
  static constexpr bool kFolded = true;
  static constexpr int kTerms = kNumTerms;
  static constexpr uint8_t kPadScale = Scaling::kScaleBytes == 1 && !Scaling::kRowTail ? 127 : 0;
  static bool fits(const uint8_t* scales) {
    if (Scaling::kRowTail) return true;
    if (Scaling::kZeros) return f32_scale_fits(scales) && f32_scale_fits(scales + 4);
    if (Scaling::kScaleBytes == 1) return e8m0_scale_fits(scales[0]) && e8m0_scale_fits(scales[1]);
    return bf16_scale_fits(scales) && bf16_scale_fits(scales + 2);
  }
  static void expand(const uint8_t* src, const uint8_t* scales, uint16_t* first, uint16_t* second) {
    for (int i = 0; i < 64; ++i) {
      const int column = Codes::column(i);
      const float weight =
          value_of<Codes, Scaling>(src, scales, column) *
          load_group_scale<Scaling>(scales + column / Scaling::kGroupCols * Scaling::kScaleBytes);
      uint16_t* out = place(first, second, i);
      *out = to_bf16(weight);
      if (kTerms == 2) out[kTileWords * 2] = to_bf16(weight - from_bf16(*out));
    }
  }
};

struct EmulatedBf16 : EmulatedBase, Unscaled {
  static constexpr int kWeightBits = 16;
  static constexpr int64_t kBlockCols = 256;
  static constexpr int column(int i) { return i; }
  static void expand(const uint8_t* src, const uint8_t*, uint16_t* first, uint16_t* second) {
    std::memcpy(first, src, 64);
    std::memcpy(second, src + 64, 64);
  }
};

const MatmulKernel kEmulated[] = {
    tiles_kernel<Emulated<EmulatedFp8, BlockScaled>>("fp8block emulated tiles", Isa::kScalar),
    tiles_kernel<EmulatedBf16>("bf16 emulated tiles", Isa::kScalar),
    tiles_kernel<Emulated<EmulatedFp8, RowScaled>>("fp8channel emulated tiles", Isa::kScalar),
    tiles_kernel<EmulatedFolded<EmulatedInt4, Int4G32Scaled, 2>>("int4g32 emulated tiles",
                                                                 Isa::kScalar),
    tiles_kernel<Emulated<EmulatedInt4, Int4G128Scaled>>("int4g128 emulated tiles", Isa::kScalar),
    tiles_kernel<EmulatedFolded<EmulatedFp4, MxScaled, 1>>("mxfp4 emulated tiles", Isa::kScalar),
    tiles_kernel<EmulatedFolded<EmulatedFp8, MxScaled, 1>>("mxfp8 emulated tiles", Isa::kScalar),
    tiles_kernel<EmulatedFolded<EmulatedUint4, Uint4Scaled<32>, 2>>("uint4g32 emulated tiles",
                                                                    Isa::kScalar),
    tiles_kernel<Emulated<EmulatedUint4, Uint4Scaled<128>>>("uint4g128 emulated tiles",
                                                            Isa::kScalar),
    tiles_kernel<EmulatedFolded<EmulatedFp4, Nvfp4Scaled, 1>>("nvfp4 emulated tiles",
                                                              Isa::kScalar)};
const WeightFormat kEmulatedFormats[] = {WeightFormat::kFp8Block,   WeightFormat::kBf16,
                                         WeightFormat::kFp8Channel, WeightFormat::kInt4G32,
                                         WeightFormat::kInt4G128,   WeightFormat::kMxfp4,
                                         WeightFormat::kMxfp8,      WeightFormat::kUint4G32,
                                         WeightFormat::kUint4G128,  WeightFormat::kNvfp4};
constexpr int kNumEmulated = 10;

}  // namespace
}  // namespace jaxmoe

using namespace jaxmoe_test;
using jaxmoe::kEmulated;
using jaxmoe::kEmulatedFormats;
using jaxmoe::kNumEmulated;

JAXMOE_TEST(emulated_tiles_meet_the_error_bound) {
  const struct {
    int64_t k, n, m;
  } shapes[] = {{1, 7, 1},     {31, 16, 2},   {128, 1, 17},  {129, 130, 5}, {300, 64, 33},
                {385, 33, 64}, {576, 16, 16}, {640, 65, 48}, {130, 20, 0},  {129, 17, 300}};
  for (int f = 0; f < kNumEmulated; ++f) {
    for (const auto& shape : shapes) {
      const int64_t k = padded_columns(kEmulatedFormats[f], shape.k);
      Weights weights(kEmulatedFormats[f], shape.n, k, 2);
      weights.randomize(shape.k);
      // Some rows with scales that cannot be folded.
      if (weights.info().scaled_by_group()) {
        weights.set_scale(0, 0x1p-126f);
        weights.set_scale(weights.num_scales() - 1, 0x1p-120f);
      }
      Activations x(shape.m, k);
      const std::vector<float> y = run(kEmulated[f], weights.view(), 0, shape.n, x, iota(shape.m));
      for (int64_t i = 0; i < shape.m; ++i) {
        for (int64_t n = 0; n < shape.n; ++n) {
          double want = 0, magnitude = 0;
          for (int64_t col = 0; col < k; ++col) {
            const double product = weights.value(n, col) * x.f32[i * x.ld + col];
            want += product;
            magnitude += std::fabs(product);
          }
          const double bound = 0x1p-24 * magnitude * (4.0 + 2.0 * std::sqrt(1.0 * k));
          JAXMOE_CHECK(std::fabs(y[i * shape.n + n] - want) <= bound, "%s k %d m %d n %d",
                       kEmulated[f].name, static_cast<int>(k), static_cast<int>(i),
                       static_cast<int>(n));
        }
      }
    }
  }
}

JAXMOE_TEST(emulated_tiles_do_not_depend_on_company) {
  for (int f = 0; f < kNumEmulated; ++f) {
    const int64_t k = padded_columns(kEmulatedFormats[f], 300);
    Weights weights(kEmulatedFormats[f], 150, k);
    weights.randomize(6);
    if (weights.info().scaled_by_group()) weights.set_scale(41 * weights.scale_cols(), 0x1p-126f);
    Activations x(40, k, 2);
    const std::vector<float> all = run(kEmulated[f], weights.view(), 0, 150, x, iota(40));
    for (int64_t m : {1, 2, 17, 33}) {
      std::vector<int32_t> ids;
      for (int64_t i = 0; i < m; ++i) ids.push_back(static_cast<int32_t>((i * 7 + m) % 40));
      for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 150}, {5, 6}, {37, 140}}) {
        const std::vector<float> part = run(kEmulated[f], weights.view(), begin, end, x, ids);
        for (int64_t i = 0; i < m; ++i) {
          JAXMOE_CHECK(std::memcmp(&part[i * (end - begin)], &all[ids[i] * 150 + begin],
                                   (end - begin) * sizeof(float)) == 0,
                       "%s m %d row %d", kEmulated[f].name, static_cast<int>(m),
                       static_cast<int>(i));
        }
      }
    }
  }
}

JAXMOE_TEST(emulated_tiles_keep_every_code_and_scale) {
  for (int f = 0; f < kNumEmulated; ++f) {
    check_every_code(kEmulated[f], kEmulatedFormats[f]);
    check_every_scale(kEmulated[f], kEmulatedFormats[f]);
  }
}

JAXMOE_TEST_MAIN

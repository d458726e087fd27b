// AMX form of kMatrix: BF16 tiles. The kVector entries of this instruction set are the AVX-512
// ones.
#include <immintrin.h>

#include "kernels/isa_tables.h"

namespace jaxmoe {
namespace {

#include "kernels/format_bits.inl"
#include "kernels/matmul_common.inl"
#include "kernels/matmul_tiles.inl"
#include "kernels/vector_avx512.inl"
#include "kernels/vector_avx512_groups.inl"
#include "kernels/vector_vbmi_fp8.inl"

// Written out because the compiler's own load intrinsic does not say that it reads memory, so a
// store before it may be moved behind it or dropped.
struct AmxTiles {
  template <int T>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  static void load(const void* base, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(base), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static void store(void* base, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(base), "r"(stride), "i"(T)
                     : "memory");
  }
  template <int C, int A, int B>
  static void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

struct AmxBase {
  using Elem = uint16_t;
  using Tiles = AmxTiles;
  static constexpr int64_t kAheadBytes = 512;
  static constexpr bool kFolded = false;
  static constexpr int kTerms = 1;

  static void flush(float* sum, const float* part, float scale) {
    _mm512_store_ps(
        sum, _mm512_fmadd_ps(_mm512_load_ps(part), _mm512_set1_ps(scale), _mm512_load_ps(sum)));
  }

  static void scale_row(float* sum, float scale) {
    _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), _mm512_set1_ps(scale)));
  }

  // Four rounds of pairwise exchanges: 1, 2, 4 and 8 rows apart.
  static void transpose(const uint32_t* src, int64_t stride, uint32_t* dst) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(src + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    // a[4 q + c]: rows 4q..4q+3, columns c, c + 4, c + 8, c + 12, one to a 128-bit lane.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i even_low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);  // lanes 0 2 | 0 2
      const __m512i odd_low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xDD);   // lanes 1 3 | 1 3
      const __m512i even_high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
      const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xDD);
      _mm512_storeu_si512(dst + c * 16, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
      _mm512_storeu_si512(dst + (c + 8) * 16, _mm512_shuffle_i32x4(even_low, even_high, 0xDD));
      _mm512_storeu_si512(dst + (c + 4) * 16, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
      _mm512_storeu_si512(dst + (c + 12) * 16, _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD));
    }
  }
};

struct AmxFp8 : AmxBase {
  static constexpr int kWeightBits = 8;
  static constexpr int64_t kBlockCols = 128;
  static constexpr int column(int i) { return fp8_bf16_column(i); }
  static void expand(const uint8_t* src, const uint8_t*, uint16_t* first, uint16_t* second) {
    __m512i a, b;
    fp8_to_bf16(src, a, b);
    _mm512_store_si512(first, a);
    _mm512_store_si512(second, b);
  }
};
struct AmxFp8Block : AmxFp8, BlockScaled {};
struct AmxFp8Channel : AmxFp8, RowScaled {};

// Powers of two are added to the exponents of BF16 numbers that have one.
inline __m512i add_exponents(__m512i values, __mmask32 which, const uint8_t* scales,
                             __mmask8 second_group) {
  const __m512i first = _mm512_set1_epi16(static_cast<short>((scales[0] - 127) * 128));
  const __m512i second = _mm512_set1_epi16(static_cast<short>((scales[1] - 127) * 128));
  return _mm512_mask_add_epi16(values, which, values,
                               _mm512_mask_blend_epi64(second_group, first, second));
}

struct AmxMxfp8 : AmxFp8, MxScaled {
  static constexpr bool kFolded = true;
  static constexpr uint8_t kPadScale = 127;
  static bool fits(const uint8_t* scales) {
    return e8m0_scale_fits(scales[0]) && e8m0_scale_fits(scales[1]);
  }
  static float value(const uint8_t* row, int64_t col) {
    return __builtin_bit_cast(float, fp8_e4m3_bits(row[col]));
  }
  static void expand(const uint8_t* src, const uint8_t* scales, uint16_t* first, uint16_t* second) {
    __m512i a, b;
    fp8_to_bf16(src, a, b);
    _mm512_store_si512(first, add_exponents(a, finite(a), scales, 0xF0));
    _mm512_store_si512(second, add_exponents(b, finite(b), scales, 0xF0));
  }
  static __mmask32 finite(__m512i values) {
    const __m512i magnitude = _mm512_and_si512(values, _mm512_set1_epi16(0x7FFF));
    return _mm512_mask_cmpneq_epi16_mask(_mm512_test_epi16_mask(magnitude, magnitude), magnitude,
                                         _mm512_set1_epi16(0x7FC0));
  }
};

struct WordShifts {
  alignas(64) uint16_t first[32];
  alignas(64) uint16_t second[32];
  constexpr WordShifts() : first(), second() {
    for (int i = 0; i < 32; ++i) {
      first[i] = static_cast<uint16_t>(i / 16 * 4);
      second[i] = static_cast<uint16_t>(8 + i / 16 * 4);
    }
  }
};
constexpr WordShifts kWordShifts;

// Both halves of a vector hold words 0-7, of one group of 32 columns, and 8-15, of the next.
template <const auto& kTable>
struct AmxNibbles : AmxBase {
  static constexpr int kWeightBits = 4;
  static constexpr int64_t kBlockCols = 128;
  static constexpr int column(int i) { return nibble_tile_column(i); }
  static void decode(const uint8_t* src, __m512i& first, __m512i& second) {
    const __m512i codes =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
    const __m512i table = _mm512_load_si512(kTable.bf16);
    first = _mm512_permutexvar_epi16(_mm512_srlv_epi16(codes, _mm512_load_si512(kWordShifts.first)),
                                     table);
    second = _mm512_permutexvar_epi16(
        _mm512_srlv_epi16(codes, _mm512_load_si512(kWordShifts.second)), table);
  }
};

struct AmxInt4G128 : AmxNibbles<kInt4Table>, Int4G128Scaled {
  static void expand(const uint8_t* src, const uint8_t*, uint16_t* first, uint16_t* second) {
    __m512i a, b;
    decode(src, a, b);
    _mm512_store_si512(first, a);
    _mm512_store_si512(second, b);
  }
};

struct AmxMxfp4 : AmxNibbles<kFp4Table>, MxScaled {
  static constexpr bool kFolded = true;
  static constexpr uint8_t kPadScale = 127;
  static bool fits(const uint8_t* scales) {
    return e8m0_scale_fits(scales[0]) && e8m0_scale_fits(scales[1]);
  }
  static float value(const uint8_t* row, int64_t col) {
    return nibble_value(row, col, fp4_e2m1_bits);
  }
  static void expand(const uint8_t* src, const uint8_t* scales, uint16_t* first, uint16_t* second) {
    __m512i a, b;
    decode(src, a, b);
    _mm512_store_si512(first, add_exponents(a, not_zero(a), scales, 0xCC));
    _mm512_store_si512(second, add_exponents(b, not_zero(b), scales, 0xCC));
  }
  static __mmask32 not_zero(__m512i values) {
    return _mm512_test_epi16_mask(values, _mm512_set1_epi16(0x7FFF));
  }
};

// (nibble - 8) * scale has up to twelve bits: the nearest BF16 number and the rest, which is one
// too.
struct AmxInt4G32 : AmxNibbles<kInt4Table>, Int4G32Scaled {
  static constexpr bool kFolded = true;
  static constexpr int kTerms = 2;
  static constexpr uint8_t kPadScale = 0;
  static bool fits(const uint8_t* scales) {
    return bf16_scale_fits(scales) && bf16_scale_fits(scales + 2);
  }
  static float value(const uint8_t* row, int64_t col) { return nibble_value(row, col, int4_bits); }
  static void expand(const uint8_t* src, const uint8_t* scales, uint16_t* first, uint16_t* second) {
    __m512i a, b;
    decode(src, a, b);
    const __m512 scale = _mm512_insertf32x8(_mm512_set1_ps(load_bf16(scales)),
                                            _mm256_set1_ps(load_bf16(scales + 2)), 1);
    split(a, scale, first);
    split(b, scale, second);
  }
  static void split(__m512i values, __m512 scale, uint16_t* out) {
    __m256i high, rest;
    split_half(_mm512_castsi512_si256(values), scale, high, rest);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + kTileWords * 2), rest);
    split_half(_mm512_extracti64x4_epi64(values, 1), scale, high, rest);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 16), high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 16 + kTileWords * 2), rest);
  }
  static void split_half(__m256i values, __m512 scale, __m256i& high, __m256i& rest) {
    const __m512 product = _mm512_mul_ps(widen(values), scale);
    high = __builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(product));
    rest = __builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(_mm512_sub_ps(product, widen(high))));
  }
  static __m512 widen(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
  }
};

// Codes and what leads them to kSignedTable, in the order of AmxNibbles.
struct AmxUint4 : AmxNibbles<kInt4Table> {
  static short shift(const uint8_t* scale) {
    return static_cast<short>(kSignedAt - load_zero(scale));
  }
  static void decode_signed(const uint8_t* src, __m512i shifts, __m512i& first, __m512i& second) {
    const __m512i codes =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
    const __m512i table = _mm512_loadu_si512(kSignedTable.bf16 + kSignedAt);
    const __m512i mask = _mm512_set1_epi16(15);
    const __m512i low = _mm512_srlv_epi16(codes, _mm512_load_si512(kWordShifts.first));
    const __m512i high = _mm512_srlv_epi16(codes, _mm512_load_si512(kWordShifts.second));
    first = _mm512_permutexvar_epi16(_mm512_add_epi16(_mm512_and_si512(low, mask), shifts), table);
    second =
        _mm512_permutexvar_epi16(_mm512_add_epi16(_mm512_and_si512(high, mask), shifts), table);
  }
  static float value(const uint8_t* row, int64_t col) {
    return static_cast<float>(row[col / 2] >> col % 2 * 4 & 15);
  }
};

struct AmxUint4G128 : AmxUint4, Uint4Scaled<128> {
  static void expand(const uint8_t* src, const uint8_t* scales, uint16_t* first, uint16_t* second) {
    __m512i a, b;
    decode_signed(src, _mm512_set1_epi16(shift(scales)), a, b);
    _mm512_store_si512(first, a);
    _mm512_store_si512(second, b);
  }
};

// (nibble - zero point) * scale has up to sixteen bits: two BF16 numbers, as for AmxInt4G32.
struct AmxUint4G32 : AmxUint4, Uint4Scaled<32> {
  static constexpr bool kFolded = true;
  static constexpr int kTerms = 2;
  static constexpr uint8_t kPadScale = 0;
  static bool fits(const uint8_t* scales) {
    return f32_scale_fits(scales) && f32_scale_fits(scales + 4);
  }
  static void expand(const uint8_t* src, const uint8_t* scales, uint16_t* first, uint16_t* second) {
    __m512i a, b;
    decode_signed(src,
                  _mm512_mask_blend_epi64(0xCC, _mm512_set1_epi16(shift(scales)),
                                          _mm512_set1_epi16(shift(scales + 4))),
                  a, b);
    const __m512 scale = _mm512_insertf32x8(_mm512_set1_ps(load_f32_of_word(scales)),
                                            _mm256_set1_ps(load_f32_of_word(scales + 4)), 1);
    AmxInt4G32::split(a, scale, first);
    AmxInt4G32::split(b, scale, second);
  }
};

// A code has two significant bits and a scale four: their product is a BF16 number.
struct AmxNvfp4 : AmxNibbles<kFp4Table>, Nvfp4Scaled {
  static constexpr bool kFolded = true;
  static constexpr uint8_t kPadScale = 0;
  static bool fits(const uint8_t*) { return true; }
  static float value(const uint8_t* row, int64_t col) {
    return nibble_value(row, col, fp4_e2m1_bits);
  }
  static void expand(const uint8_t* src, const uint8_t* scales, uint16_t* first, uint16_t* second) {
    __m512i a, b;
    decode(src, a, b);
    const __m512 low = _mm512_insertf32x8(_mm512_castps256_ps512(pair(scales)), pair(scales + 2),
                                          1);  // a group to four words
    _mm512_store_si512(first, multiply(a, low));
    _mm512_store_si512(second, multiply(b, low));
  }
  static __m256 pair(const uint8_t* scales) {
    return _mm256_set_m128(_mm_set1_ps(load_e4m3(scales + 1)), _mm_set1_ps(load_e4m3(scales)));
  }
  static __m512i multiply(__m512i values, __m512 scale) {
    const __m512 low = AmxInt4G32::widen(_mm512_castsi512_si256(values));
    const __m512 high = AmxInt4G32::widen(_mm512_extracti64x4_epi64(values, 1));
    return __builtin_bit_cast(
        __m512i, _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale)));
  }
};

// Copied to tile order rather than loaded in place: rows a multiple of 4 KiB apart would meet in
// the same few cache sets, and tails need no case of their own.
struct AmxBf16 : AmxBase, Unscaled {
  static constexpr int kWeightBits = 16;
  static constexpr int64_t kBlockCols = 256;
  static constexpr int column(int i) { return i; }
  static void expand(const uint8_t* src, const uint8_t*, uint16_t* first, uint16_t* second) {
    _mm512_store_si512(first, _mm512_loadu_si512(src));
    _mm512_store_si512(second, _mm512_loadu_si512(src + 64));
  }
};

// Every tile 16 rows of 64 bytes.
struct TileConfig {
  alignas(64) uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace

namespace isa_tables {

void fill_amx(KernelTable& table, const Traits&) {
  const auto set = [&table](WeightFormat format, const MatmulKernel& kernel) {
    table.matmul[static_cast<int>(Family::kMatrix)][static_cast<int>(format)] = kernel;
  };
  const Isa isa = Isa::kAmx;
  set(WeightFormat::kBf16, tiles_kernel<AmxBf16>("matmul_bf16_bf16tile_amx", isa));
  set(WeightFormat::kFp8Block, tiles_kernel<AmxFp8Block>("matmul_fp8block_bf16tile_amx", isa));
  set(WeightFormat::kFp8Channel,
      tiles_kernel<AmxFp8Channel>("matmul_fp8channel_bf16tile_amx", isa));
  set(WeightFormat::kInt4G32, tiles_kernel<AmxInt4G32>("matmul_int4g32_bf16tile_amx", isa));
  set(WeightFormat::kInt4G128, tiles_kernel<AmxInt4G128>("matmul_int4g128_bf16tile_amx", isa));
  set(WeightFormat::kMxfp4, tiles_kernel<AmxMxfp4>("matmul_mxfp4_bf16tile_amx", isa));
  set(WeightFormat::kMxfp8, tiles_kernel<AmxMxfp8>("matmul_mxfp8_bf16tile_amx", isa));
  set(WeightFormat::kUint4G32, tiles_kernel<AmxUint4G32>("matmul_uint4g32_bf16tile_amx", isa));
  set(WeightFormat::kUint4G128, tiles_kernel<AmxUint4G128>("matmul_uint4g128_bf16tile_amx", isa));
  set(WeightFormat::kNvfp4, tiles_kernel<AmxNvfp4>("matmul_nvfp4_bf16tile_amx", isa));
}

void amx_thread_init() {
  const TileConfig config;
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

void amx_thread_release() { __asm__ volatile("tilerelease"); }

}  // namespace isa_tables
}  // namespace jaxmoe

// AVX2 + FMA + F16C form (kVector arithmetic; the kMatrix entries are the same kernels).
#include <immintrin.h>

#include "kernels/isa_tables.h"

namespace jaxmoe {
namespace {

#include "kernels/format_bits.inl"
#include "kernels/matmul_common.inl"
#include "kernels/matmul_rows.inl"

struct Avx2Base {
  using Elem = float;
  using Acc = __m256;
  using Weights = __m256;
  using Scale = float;
  struct Flag {};
  static constexpr int kElems = 8;
  static constexpr int kAccFloats = 8;
  // 16 registers hold a tile of 12 sums (unscaled) + 3 activations + 1 weight vector.
  static constexpr int kRows = 4;
  static constexpr int kTokens = 3;
  // Sums of 96 activation rows are 12 KiB.
  static constexpr int64_t kTokenChunk = 96;
  // 4 decoded rows of a chunk are 8 KiB, those of three activation rows 6 KiB: together less than
  // half a first-level cache.
  static constexpr int64_t kChunkBlocks = 4;
  static constexpr int kFewRows = 4;
  static constexpr int kMaxFew = 2;
  static constexpr int one_stream_rows(int) { return 2; }
  static constexpr int kMaxFewOneStream = 2;
  static constexpr float kScaleFold = 1.0f;
  static constexpr bool kShareActivations = false;
  static constexpr int kScaleChunk = 0;
  static constexpr int kWidenedBytes = 0;

  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static void store_weights(float* p, __m256 a) { _mm256_storeu_ps(p, a); }
  static __m256 load_acc(const float* p) { return _mm256_loadu_ps(p); }
  static void store_acc(float* p, __m256 a) { _mm256_storeu_ps(p, a); }
  static __m256 mac(__m256 sum, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, sum); }
  static __m256 flush(__m256 sum, __m256 part, float scale) {
    return _mm256_fmadd_ps(part, _mm256_set1_ps(scale), sum);
  }
  static float reduce(__m256 a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static bool any_nan(Flag) { return false; }
};

struct Avx2F32 : Avx2Base {
  static constexpr int kWeightBits = 32;
  static constexpr int kGroupVecs = 1;
  static constexpr int column(int i) { return i; }
  static void decode(const uint8_t* src, __m256 (&out)[1], Flag&) {
    out[0] = _mm256_loadu_ps(reinterpret_cast<const float*>(src));
  }
};

struct Avx2Bf16 : Avx2Base {
  static constexpr int kWeightBits = 16;
  static constexpr int kGroupVecs = 2;
  // 32-bit lanes hold two weights: the even columns of 16 first, then the odd ones.
  static constexpr int column(int i) { return i / 16 * 16 + i % 8 * 2 + i % 16 / 8; }
  static void decode(const uint8_t* src, __m256 (&out)[2], Flag&) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    out[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
  }
};

// E4M3 shifted into FP16's fields is the value times 2^-8, subnormals included, and vcvtph2ps is
// exact on both (and heeds no flush mode). The two NaN codes come out as 480 * 2^-8: `Flag`
// remembers the largest magnitude.
struct Avx2Fp8 : Avx2Base {
  using Flag = __m256i;
  static constexpr int kWeightBits = 8;
  static constexpr int kGroupVecs = 4;
  static constexpr float kScaleFold = 256.0f;
  // 16-bit lanes hold two weights: even columns of 32, then the odd ones, eight to a vector.
  static constexpr int column(int i) { return i / 32 * 32 + i % 16 * 2 + i % 32 / 16; }
  static void decode(const uint8_t* src, __m256 (&out)[4], Flag& flag) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    const __m256i fields = _mm256_set1_epi16(static_cast<short>(0xBF80));
    flag = _mm256_max_epu8(flag, _mm256_and_si256(codes, _mm256_set1_epi8(0x7F)));
    const __m256i even =
        _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 1), fields);
    const __m256i odd = _mm256_and_si256(_mm256_srai_epi16(codes, 1), fields);
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(even));
    out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(even, 1));
    out[2] = _mm256_cvtph_ps(_mm256_castsi256_si128(odd));
    out[3] = _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1));
  }
  static bool any_nan(Flag flag) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(flag, _mm256_set1_epi8(0x7F))) != 0;
  }
};

// As in vector_avx512_groups.inl, 64 columns, two groups of 32, at a time: nibbles by shifts of
// 32-bit lanes, which hold eight.
struct Avx2Nibbles : Avx2Base {
  static constexpr int kWeightBits = 4;
  static constexpr int kGroupVecs = 8;
  static constexpr int kFlushVecs = 8;
  using Scale = __m256;
  static constexpr int column(int i) { return i / 64 * 64 + i % 8 * 8 + i % 64 / 8; }
  static __m256 flush(__m256 sum, __m256 part, __m256 scale) {
    return _mm256_fmadd_ps(part, scale, sum);
  }
  static __m256 lanes(float first, float second) {
    return _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first));
  }
};

struct Avx2Int4 : Avx2Nibbles {
  static void decode(const uint8_t* src, __m256 (&out)[8], Flag&) {
    // Of two's complement the same four bits, but for the highest.
    const __m256i codes = _mm256_xor_si256(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)), _mm256_set1_epi8(-0x78));
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      out[j] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(codes, 28 - 4 * j), 28));
    }
  }
};
struct Avx2Int4G32 : Avx2Int4, Int4G32Scaled {
  static __m256 load_scale(const uint8_t* scales, int i) {
    return lanes(load_bf16(scales + 4 * i), load_bf16(scales + 4 * i + 2));
  }
};
struct Avx2Int4G128 : Avx2Int4, Int4G128Scaled {
  static __m256 load_scale(const uint8_t* scales, int) { return _mm256_set1_ps(load_bf16(scales)); }
};

// Codes less the zero points of their groups, as integers; both are small.
template <int kCols>
struct Avx2Uint4 : Avx2Nibbles, Uint4Scaled<kCols> {
  static void decode(const uint8_t* src, const uint8_t* scales, int at, __m256 (&out)[8]) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    const __m256i zeros = _mm256_and_si256(words(scales, at), _mm256_set1_epi32(kZeroMask));
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes, 4 * j), _mm256_set1_epi32(15));
      out[j] = _mm256_cvtepi32_ps(_mm256_sub_epi32(code, zeros));
    }
  }
  static __m256 load_scale(const uint8_t* scales, int i) {
    return _mm256_castsi256_ps(
        _mm256_andnot_si256(_mm256_set1_epi32(kZeroMask), words(scales, i * 64)));
  }
  // Of the 64 columns from `at` on, each in the lanes of its group.
  static __m256i words(const uint8_t* scales, int at) {
    const uint8_t* first = scales + at / kCols * 4;
    return _mm256_set_m128i(_mm_set1_epi32(static_cast<int>(load_word(first + 32 / kCols * 4))),
                            _mm_set1_epi32(static_cast<int>(load_word(first))));
  }
};

struct Avx2Fp4 : Avx2Nibbles {
  static void decode(const uint8_t* src, __m256 (&out)[8], Flag&) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i sign =
          _mm256_and_si256(_mm256_slli_epi32(codes, 28 - 4 * j), _mm256_set1_epi32(1 << 31));
      // Looks at three bits of the index.
      out[j] = _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, _mm256_srli_epi32(codes, 4 * j)),
                            _mm256_castsi256_ps(sign));
    }
  }
};
struct Avx2Mxfp4 : Avx2Fp4, MxScaled {
  static __m256 load_scale(const uint8_t* scales, int i) {
    return lanes(load_e8m0(scales + 2 * i), load_e8m0(scales + 2 * i + 1));
  }
};

// Four scales to 64 columns, two lanes each: E4M3 shifted into FP16's fields, as in Avx2Fp8.
struct Avx2Nvfp4 : Avx2Fp4, Nvfp4Scaled {
  static __m256 load_scale(const uint8_t* scales, int i) {
    const __m128i places = _mm_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3);
    const __m128i bytes =
        _mm_shuffle_epi8(_mm_set1_epi32(static_cast<int>(load_word(scales + 4 * i))), places);
    const __m128i fields = _mm_set1_epi16(static_cast<short>(0xBF80));
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(bytes, 1), fields)),
                         _mm256_set1_ps(256.0f));
  }
};

// 32 codes, one group, at a time. What the decoder left out multiplies the sums, as a scale may be
// the largest there is.
struct Avx2Mxfp8 : Avx2Fp8, MxScaled {
  static constexpr int kFlushVecs = 4;
  static float load_scale(const uint8_t* scales, int i) { return load_e8m0(scales + i); }
  static __m256 flush(__m256 sum, __m256 part, float scale) {
    return _mm256_fmadd_ps(_mm256_mul_ps(part, _mm256_set1_ps(kScaleFold)), _mm256_set1_ps(scale),
                           sum);
  }
};

}  // namespace

namespace isa_tables {

void fill_avx2(KernelTable& table, const Traits& traits) {
  for (MatmulKernel(&family)[kNumFormats] : table.matmul) {
    const auto set = [&family](WeightFormat format, const MatmulKernel& kernel) {
      family[static_cast<int>(format)] = kernel;
    };
    set(WeightFormat::kF32,
        rows_kernel<Plain<Avx2F32>>(traits, "matmul_f32_f32fma_avx2", Isa::kAvx2));
    set(WeightFormat::kBf16,
        rows_kernel<Plain<Avx2Bf16>>(traits, "matmul_bf16_f32fma_avx2", Isa::kAvx2));
    set(WeightFormat::kFp8Block,
        rows_kernel<Blocks<Avx2Fp8>>(traits, "matmul_fp8block_f32fma_avx2", Isa::kAvx2));
    set(WeightFormat::kFp8Channel,
        rows_kernel<Channels<Avx2Fp8>>(traits, "matmul_fp8channel_f32fma_avx2", Isa::kAvx2));
    set(WeightFormat::kInt4G32,
        rows_kernel<Avx2Int4G32>(traits, "matmul_int4g32_f32fma_avx2", Isa::kAvx2));
    set(WeightFormat::kInt4G128,
        rows_kernel<Avx2Int4G128>(traits, "matmul_int4g128_f32fma_avx2", Isa::kAvx2));
    set(WeightFormat::kMxfp4,
        rows_kernel<Avx2Mxfp4>(traits, "matmul_mxfp4_f32fma_avx2", Isa::kAvx2));
    set(WeightFormat::kMxfp8,
        rows_kernel<Avx2Mxfp8>(traits, "matmul_mxfp8_f32fma_avx2", Isa::kAvx2));
    set(WeightFormat::kUint4G32,
        rows_kernel<Avx2Uint4<32>>(traits, "matmul_uint4g32_f32fma_avx2", Isa::kAvx2));
    set(WeightFormat::kUint4G128,
        rows_kernel<Avx2Uint4<128>>(traits, "matmul_uint4g128_f32fma_avx2", Isa::kAvx2));
    set(WeightFormat::kNvfp4,
        rows_kernel<Avx2Nvfp4>(traits, "matmul_nvfp4_f32fma_avx2", Isa::kAvx2));
  }
}

}  // namespace isa_tables
}  // namespace jaxmoe

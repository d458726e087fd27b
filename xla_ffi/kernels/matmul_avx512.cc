// AVX-512 F/BW/DQ/VL form (kVector arithmetic; the kMatrix entries are the same kernels).
#include <immintrin.h>

#include "kernels/isa_tables.h"

namespace jaxmoe {
namespace {

#include "kernels/format_bits.inl"
#include "kernels/matmul_common.inl"
#include "kernels/matmul_rows.inl"
#include "kernels/vector_avx512.inl"
#include "kernels/vector_avx512_groups.inl"

// As in matmul_avx2.cc: E4M3 shifted into FP16's fields, the two NaN codes noted in `Flag`.
struct Avx512Fp8 : Avx512Base {
  using Flag = __m512i;
  static constexpr int kWeightBits = 8;
  static constexpr int kGroupVecs = 4;
  static constexpr float kScaleFold = 256.0f;
  // 16-bit lanes hold two weights: even columns of 64, then the odd ones, sixteen to a vector.
  static constexpr int column(int i) { return i / 64 * 64 + i % 32 * 2 + i % 64 / 32; }
  static void decode(const uint8_t* src, __m512 (&out)[4], Flag& flag) {
    const __m512i codes = _mm512_loadu_si512(src);
    const __m512i fields = _mm512_set1_epi16(static_cast<short>(0xBF80));
    flag = _mm512_max_epu8(flag, _mm512_and_si512(codes, _mm512_set1_epi8(0x7F)));
    const __m512i even =
        _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 1), fields);
    const __m512i odd = _mm512_and_si512(_mm512_srai_epi16(codes, 1), fields);
    out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(even));
    out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1));
    out[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(odd));
    out[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1));
  }
  static bool any_nan(Flag flag) {
    return _mm512_cmpeq_epi8_mask(flag, _mm512_set1_epi8(0x7F)) != 0;
  }
};

// 32 codes, one group, at a time. What the decoder left out multiplies the sums, as a scale may be
// the largest there is.
struct Avx512Mxfp8 : Avx512Base, MxScaled {
  using Flag = __m256i;
  static constexpr int kWeightBits = 8;
  static constexpr int kGroupVecs = 2;
  static constexpr int kFlushVecs = 2;
  static constexpr int column(int i) { return i / 32 * 32 + i % 16 * 2 + i % 32 / 16; }
  static void decode(const uint8_t* src, __m512 (&out)[2], Flag& flag) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    const __m256i fields = _mm256_set1_epi16(static_cast<short>(0xBF80));
    flag = _mm256_max_epu8(flag, _mm256_and_si256(codes, _mm256_set1_epi8(0x7F)));
    out[0] = _mm512_cvtph_ps(
        _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 1), fields));
    out[1] = _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(codes, 1), fields));
  }
  static float load_scale(const uint8_t* scales, int i) { return load_e8m0(scales + i); }
  static __m512 flush(__m512 sum, __m512 part, float scale) {
    return _mm512_fmadd_ps(_mm512_mul_ps(part, _mm512_set1_ps(256.0f)), _mm512_set1_ps(scale), sum);
  }
  static bool any_nan(Flag flag) {
    return _mm256_cmpeq_epi8_mask(flag, _mm256_set1_epi8(0x7F)) != 0;
  }
};

}  // namespace

namespace isa_tables {

void fill_avx512(KernelTable& table, const Traits& traits) {
  for (MatmulKernel(&family)[kNumFormats] : table.matmul) {
    const auto set = [&family](WeightFormat format, const MatmulKernel& kernel) {
      family[static_cast<int>(format)] = kernel;
    };
    set(WeightFormat::kF32,
        rows_kernel<Plain<Avx512F32>>(traits, "matmul_f32_f32fma_avx512", Isa::kAvx512));
    set(WeightFormat::kBf16,
        rows_kernel<Plain<Avx512Bf16>>(traits, "matmul_bf16_f32fma_avx512", Isa::kAvx512));
    set(WeightFormat::kFp8Block,
        rows_kernel<Blocks<Avx512Fp8>>(traits, "matmul_fp8block_f32fma_avx512", Isa::kAvx512));
    set(WeightFormat::kFp8Channel,
        rows_kernel<Channels<Avx512Fp8>>(traits, "matmul_fp8channel_f32fma_avx512", Isa::kAvx512));
    set(WeightFormat::kInt4G32,
        rows_kernel<Avx512Groups<Avx512Nibbles<kInt4Table>, Avx512Int4G32Scales>>(
            traits, "matmul_int4g32_f32fma_avx512", Isa::kAvx512));
    set(WeightFormat::kInt4G128,
        rows_kernel<Avx512Groups<Avx512Nibbles<kInt4Table>, Avx512Int4G128Scales>>(
            traits, "matmul_int4g128_f32fma_avx512", Isa::kAvx512));
    set(WeightFormat::kMxfp4, rows_kernel<Avx512Groups<Avx512Nibbles<kFp4Table>, Avx512MxScales>>(
                                  traits, "matmul_mxfp4_f32fma_avx512", Isa::kAvx512));
    set(WeightFormat::kMxfp8,
        rows_kernel<Avx512Mxfp8>(traits, "matmul_mxfp8_f32fma_avx512", Isa::kAvx512));
    set(WeightFormat::kUint4G32, rows_kernel<Avx512Groups<Avx512Uint4G32, Avx512Uint4G32Scales>>(
                                     traits, "matmul_uint4g32_f32fma_avx512", Isa::kAvx512));
    set(WeightFormat::kUint4G128, rows_kernel<Avx512Groups<Avx512Uint4G128, Avx512Uint4G128Scales>>(
                                      traits, "matmul_uint4g128_f32fma_avx512", Isa::kAvx512));
    set(WeightFormat::kNvfp4,
        rows_kernel<Avx512Groups<Avx512Nibbles<kFp4Table>, Avx512Nvfp4Scales>>(
            traits, "matmul_nvfp4_f32fma_avx512", Isa::kAvx512));
  }
}

}  // namespace isa_tables
}  // namespace jaxmoe

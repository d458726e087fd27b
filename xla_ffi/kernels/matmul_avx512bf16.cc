// AVX-512 with VBMI and BF16: FP8 decoded by table for kVector (13 vector operations per 64 codes,
// against 21 of the shift through FP16), and vdpbf16ps for kMatrix.
#include <immintrin.h>

#include "kernels/isa_tables.h"

namespace jaxmoe {
namespace {

#include "kernels/format_bits.inl"
#include "kernels/matmul_common.inl"
#include "kernels/matmul_rows.inl"
#include "kernels/vector_avx512.inl"
#include "kernels/vector_avx512_groups.inl"
#include "kernels/vector_vbmi_fp8.inl"

struct VbmiFp8 : Avx512Base {
  static constexpr int kWeightBits = 8;
  static constexpr int kGroupVecs = 4;
  // Each vector of BF16 pairs gives its even positions, then its odd ones.
  static constexpr int column(int i) {
    return fp8_bf16_column(i / 32 * 32 + i % 16 * 2 + i % 32 / 16);
  }
  static void decode(const uint8_t* src, __m512 (&out)[4], Flag&) {
    __m512i pairs[2];
    fp8_to_bf16(src, pairs[0], pairs[1]);
    for (int j = 0; j < 2; ++j) {
      out[2 * j] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[j], 16));
      out[2 * j + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs[j], _mm512_set1_epi32(-65536)));
    }
  }
};

// BF16 pairs along the lanes. vdpbf16ps treats subnormals as zero and rounds each lane's two
// products in its own way, the same for every call.
struct DotBase : Avx512Base {
  using Elem = uint16_t;
  using Weights = __m512i;
  static constexpr int kElems = 32;
  // Elements of half the size: as many bytes as in Avx512Base.
  static constexpr int64_t kChunkBlocks = 8;
  // One row is the one stream that hardware follows best. With more activations, several rows share
  // what is loaded of them: sums, partial sums, decoded vectors and tables take 27 to 29 registers.
  static constexpr int one_stream_rows(int m) { return m == 1 ? 1 : (m == 2 ? 4 : 2); }
  static __m512i load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static void store_weights(uint16_t* p, __m512i a) { _mm512_storeu_si512(p, a); }
  static __m512 mac(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, __builtin_bit_cast(__m512bh, a), __builtin_bit_cast(__m512bh, b));
  }
};

struct DotBf16 : DotBase {
  static constexpr int kWeightBits = 16;
  static constexpr int kGroupVecs = 1;
  static constexpr int column(int i) { return i; }
  static void decode(const uint8_t* src, __m512i (&out)[1], Flag&) {
    out[0] = _mm512_loadu_si512(src);
  }
};

struct DotFp8 : DotBase {
  // Two rows keep the core busier than one (0.84 of the ceiling against 0.75 on Zen 4).
  static constexpr int one_stream_rows(int m) { return m == 2 ? 4 : 2; }
  static constexpr int kWeightBits = 8;
  static constexpr int kGroupVecs = 2;
  static constexpr int column(int i) { return fp8_bf16_column(i); }
  static void decode(const uint8_t* src, __m512i (&out)[2], Flag&) {
    fp8_to_bf16(src, out[0], out[1]);
  }
};

template <const auto& kTable>
struct DotNibbles : DotBase {
  static constexpr int kWeightBits = 4;
  static constexpr int kGroupVecs = 4;
  // Half a byte a weight: loads of activations would limit what they meet (four to one of weights),
  // and decoding takes about as long as reading does, so rows go together even where memory likes
  // one stream (0.9 of the ceiling with four rows on Zen 4, 0.4 with one).
  static constexpr bool kShareActivations = true;
  static constexpr int kFewRows = 4;
  static constexpr int one_stream_rows(int m) { return m == 1 ? 4 : 2; }
  // 16-bit lanes hold four weights.
  static constexpr int column(int i) { return i % 32 * 4 + i / 32; }
  static void decode(const uint8_t* src, __m512i (&out)[4], Flag&) {
    const __m512i codes = _mm512_loadu_si512(src);
    const __m512i table = _mm512_load_si512(kTable.bf16);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      out[j] =
          _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, static_cast<unsigned>(4 * j)), table);
    }
  }
};

struct DotUint4G32 : DotNibbles<kInt4Table> {
  static void decode(const uint8_t* src, const uint8_t* scales, int, __m512i (&out)[4]) {
    const __m512i codes = _mm512_loadu_si512(src);
    const __m512i shifts = Avx512Uint4G32Scales::shifts(scales);
    const __m512i table = _mm512_loadu_si512(kSignedTable.bf16 + kSignedAt);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i code = _mm512_and_si512(_mm512_srli_epi16(codes, static_cast<unsigned>(4 * j)),
                                            _mm512_set1_epi16(15));
      out[j] = _mm512_permutexvar_epi16(_mm512_add_epi16(code, shifts), table);
    }
  }
};
struct DotUint4G128 : DotNibbles<kInt4Table> {
  static void decode(const uint8_t* src, const uint8_t* scales, int, __m512i (&out)[4]) {
    const __m512i codes = _mm512_loadu_si512(src);
    // Twice, as in NibbleTable.
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(kSignedTable.bf16 + kZeroAt - load_zero(scales))));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      out[j] =
          _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, static_cast<unsigned>(4 * j)), table);
    }
  }
};

// Powers of two are BF16 numbers, 2^-127 a subnormal one: widened so, they take half the
// instructions in the loop.
struct DotMxfp4 : Avx512Groups<DotNibbles<kFp4Table>, Avx512MxScales> {
  static constexpr int kScaleChunk = 8;
  static constexpr int kWidenedBytes = 8;
  // `count` codes, at most 32.
  static void widen_scales(const uint8_t* codes, int64_t count, uint8_t* out) {
    const __mmask32 there = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, codes));
    _mm512_mask_storeu_epi16(
        out, there, _mm512_max_epu16(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(1 << 6)));
  }
  static __m512 load_widened(const uint8_t* scales, int i) {
    return Avx512Int4G32Scales::load_scale(scales, i);
  }
};

// 64 codes are two groups, each in two 128-bit lanes.
template <class Decoder>
struct Mxfp8 : Decoder, MxScaled {
  using Scale = __m512;
  static constexpr int kFlushVecs = 64 / Decoder::kElems;
  static __m512 load_scale(const uint8_t* scales, int i) {
    return powers_of_two(
        _mm512_shuffle_epi8(broadcast_32(scales), _mm512_load_si512(kLaneBytes.e8m0_pairs[i])));
  }
  static __m512 flush(__m512 sum, __m512 part, __m512 scale) {
    return _mm512_fmadd_ps(part, scale, sum);
  }
};

}  // namespace

namespace isa_tables {

void fill_avx512bf16(KernelTable& table, const Traits& traits) {
  const auto set = [&table](Family family, WeightFormat format, const MatmulKernel& kernel) {
    table.matmul[static_cast<int>(family)][static_cast<int>(format)] = kernel;
  };
  const Isa isa = Isa::kAvx512Bf16;
  set(Family::kVector, WeightFormat::kFp8Block,
      rows_kernel<Blocks<VbmiFp8>>(traits, "matmul_fp8block_f32fma_avx512vbmi", isa));
  set(Family::kVector, WeightFormat::kFp8Channel,
      rows_kernel<Channels<VbmiFp8>>(traits, "matmul_fp8channel_f32fma_avx512vbmi", isa));
  set(Family::kMatrix, WeightFormat::kBf16,
      rows_kernel<Plain<DotBf16>>(traits, "matmul_bf16_bf16dot_avx512bf16", isa));
  set(Family::kMatrix, WeightFormat::kFp8Block,
      rows_kernel<Blocks<DotFp8>>(traits, "matmul_fp8block_bf16dot_avx512bf16", isa));
  set(Family::kMatrix, WeightFormat::kFp8Channel,
      rows_kernel<Channels<DotFp8>>(traits, "matmul_fp8channel_bf16dot_avx512bf16", isa));
  set(Family::kVector, WeightFormat::kMxfp8,
      rows_kernel<Mxfp8<VbmiFp8>>(traits, "matmul_mxfp8_f32fma_avx512vbmi", isa));
  set(Family::kMatrix, WeightFormat::kInt4G32,
      rows_kernel<Avx512Groups<DotNibbles<kInt4Table>, Avx512Int4G32Scales>>(
          traits, "matmul_int4g32_bf16dot_avx512bf16", isa));
  set(Family::kMatrix, WeightFormat::kInt4G128,
      rows_kernel<Avx512Groups<DotNibbles<kInt4Table>, Avx512Int4G128Scales>>(
          traits, "matmul_int4g128_bf16dot_avx512bf16", isa));
  set(Family::kMatrix, WeightFormat::kMxfp4,
      rows_kernel<DotMxfp4>(traits, "matmul_mxfp4_bf16dot_avx512bf16", isa));
  set(Family::kMatrix, WeightFormat::kMxfp8,
      rows_kernel<Mxfp8<DotFp8>>(traits, "matmul_mxfp8_bf16dot_avx512bf16", isa));
  set(Family::kMatrix, WeightFormat::kUint4G32,
      rows_kernel<Avx512Groups<DotUint4G32, Avx512Uint4G32Scales>>(
          traits, "matmul_uint4g32_bf16dot_avx512bf16", isa));
  set(Family::kMatrix, WeightFormat::kUint4G128,
      rows_kernel<Avx512Groups<DotUint4G128, Avx512Uint4G128Scales>>(
          traits, "matmul_uint4g128_bf16dot_avx512bf16", isa));
  set(Family::kMatrix, WeightFormat::kNvfp4,
      rows_kernel<Avx512Groups<DotNibbles<kFp4Table>, Avx512Nvfp4Scales>>(
          traits, "matmul_nvfp4_bf16dot_avx512bf16", isa));
  // BF16 weights too: only their subnormals differ, which vdpbf16ps takes as zero.
  const Family source = traits.fast_bf16_dot ? Family::kMatrix : Family::kVector;
  for (int format = 0; format < kNumFormats; ++format) {
    table.matmul[static_cast<int>(Family::kVectorBf16)][format] =
        table.matmul[static_cast<int>(source)][format];
  }
}

}  // namespace isa_tables
}  // namespace jaxmoe

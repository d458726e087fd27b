// AMX form of kMatrix: BF16 tiles. The kVector entries of this instruction set are the AVX-512
// ones.
#include <immintrin.h>

#include "kernels/isa_tables.h"

namespace jaxmoe {
namespace {

#include "kernels/format_bits.inl"
#include "kernels/matmul_common.inl"
#include "kernels/matmul_tiles.inl"
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

  static void flush(float* sum, const float* part, float scale) {
    _mm512_store_ps(
        sum, _mm512_fmadd_ps(_mm512_load_ps(part), _mm512_set1_ps(scale), _mm512_load_ps(sum)));
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

struct AmxFp8 : AmxBase, BlockScaled {
  static constexpr int kWeightBits = 8;
  static constexpr int64_t kBlockCols = 128;
  static constexpr int column(int i) { return fp8_bf16_column(i); }
  static void expand(const uint8_t* src, uint16_t* first, uint16_t* second) {
    __m512i a, b;
    fp8_to_bf16(src, a, b);
    _mm512_store_si512(first, a);
    _mm512_store_si512(second, b);
  }
};

// Copied to tile order rather than loaded in place: rows a multiple of 4 KiB apart would meet in
// the same few cache sets, and tails need no case of their own.
struct AmxBf16 : AmxBase, Unscaled {
  static constexpr int kWeightBits = 16;
  static constexpr int64_t kBlockCols = 256;
  static constexpr int column(int i) { return i; }
  static void expand(const uint8_t* src, uint16_t* first, uint16_t* second) {
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
  constexpr int kMatrix = static_cast<int>(Family::kMatrix);
  table.matmul[kMatrix][static_cast<int>(WeightFormat::kFp8Block)] =
      tiles_kernel<AmxFp8>("matmul_fp8block_bf16tile_amx", Isa::kAmx);
  table.matmul[kMatrix][static_cast<int>(WeightFormat::kBf16)] =
      tiles_kernel<AmxBf16>("matmul_bf16_bf16tile_amx", Isa::kAmx);
}

void amx_thread_init() {
  const TileConfig config;
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

void amx_thread_release() { __asm__ volatile("tilerelease"); }

}  // namespace isa_tables
}  // namespace jaxmoe

// Formats with scales of 32 or 128 columns on 512-bit vectors. Included after vector_avx512.inl
// inside an anonymous namespace.
//
// Nibbles are taken from 64 bytes at a time, the 128 columns of a block, by shifting all lanes:
// each vector then holds columns of one group of 32 in each of its 128-bit lanes, so that the
// block's sums are scaled at once. Prepared activations follow the same order.

// Sixteen values of a nibble: FP32, and twice BF16 (vpermw looks at five bits, of which the fifth
// is the next nibble's).
template <uint32_t (*kBits)(uint32_t)>
struct NibbleTable {
  alignas(64) uint32_t f32[16];
  alignas(64) uint16_t bf16[32];
  constexpr NibbleTable() : f32(), bf16() {
    for (uint32_t code = 0; code < 16; ++code) {
      f32[code] = kBits(code);
      bf16[code] = bf16[code + 16] = static_cast<uint16_t>(kBits(code) >> 16);
    }
  }
};
constexpr NibbleTable<int4_bits> kInt4Table;
constexpr NibbleTable<fp4_e2m1_bits> kFp4Table;

// Bytes of a 128-bit lane's 32-bit elements: where in 16 bytes the two bytes of its own scale lie.
struct LaneBytes {
  alignas(64) uint8_t bf16[64];
  alignas(64) uint8_t e8m0[64];
  alignas(64) uint8_t e8m0_pairs[2][64];  // scales 0 0 1 1, then 2 2 3 3
  constexpr LaneBytes() : bf16(), e8m0(), e8m0_pairs() {
    for (int i = 0; i < 64; ++i) {
      const uint8_t lane = static_cast<uint8_t>(i / 16), none = 0x80;
      bf16[i] = i % 4 < 2 ? none : static_cast<uint8_t>(2 * lane + i % 2);
      e8m0[i] = i % 4 < 3 ? none : lane;
      e8m0_pairs[0][i] = i % 4 < 3 ? none : static_cast<uint8_t>(lane / 2);
      e8m0_pairs[1][i] = i % 4 < 3 ? none : static_cast<uint8_t>(2 + lane / 2);
    }
  }
};
constexpr LaneBytes kLaneBytes;

// Codes in the top bytes of 32-bit elements to 2^(code - 127).
inline __m512 powers_of_two(__m512i codes) {
  return _mm512_castsi512_ps(
      _mm512_max_epu32(_mm512_srli_epi32(codes, 1), _mm512_set1_epi32(1 << 22)));
}

inline __m512i broadcast_32(const uint8_t* at) {
  int32_t bits;
  __builtin_memcpy(&bits, at, 4);
  return _mm512_set1_epi32(bits);
}

// Scales of a block's four groups, each in its lane; or of the block.
struct Avx512Int4G32Scales : Int4G32Scaled {
  using Scale = __m512;
  static __m512 load_scale(const uint8_t* scales, int) {
    int64_t bits;
    __builtin_memcpy(&bits, scales, 8);
    return _mm512_castsi512_ps(
        _mm512_shuffle_epi8(_mm512_set1_epi64(bits), _mm512_load_si512(kLaneBytes.bf16)));
  }
};
struct Avx512Int4G128Scales : Int4G128Scaled {
  using Scale = __m512;
  static __m512 load_scale(const uint8_t* scales, int) {
    int16_t bits;
    __builtin_memcpy(&bits, scales, 2);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(bits), 16));
  }
};
struct Avx512MxScales : MxScaled {
  using Scale = __m512;
  static __m512 load_scale(const uint8_t* scales, int) {
    return powers_of_two(
        _mm512_shuffle_epi8(broadcast_32(scales), _mm512_load_si512(kLaneBytes.e8m0)));
  }
};

// A decoder of nibbles with its scales; the flush takes a vector.
template <class Decoder, class Scales>
struct Avx512Groups : Decoder, Scales {
  using Scale = typename Scales::Scale;
  static constexpr int kFlushVecs = kBlock / Decoder::kElems;
  static __m512 flush(__m512 sum, __m512 part, __m512 scale) {
    return _mm512_fmadd_ps(part, scale, sum);
  }
};

template <const auto& kTable>
struct Avx512Nibbles : Avx512Base {
  static constexpr int kWeightBits = 4;
  static constexpr int kGroupVecs = 8;
  // 32-bit lanes hold eight weights.
  static constexpr int column(int i) { return i % 16 * 8 + i / 16; }
  static void decode(const uint8_t* src, __m512 (&out)[8], Flag&) {
    const __m512i codes = _mm512_loadu_si512(src);
    const __m512 table = _mm512_load_ps(kTable.f32);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      out[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, static_cast<unsigned>(4 * j)), table);
    }
  }
};

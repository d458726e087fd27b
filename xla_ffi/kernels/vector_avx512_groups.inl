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

// The integers from -32 to 15. Sixteen from kZeroAt - z on are what all codes with a zero point z
// stand for; thirty-two from kSignedAt on are what code + kSignedAt - z stands for, where z is at
// most that.
constexpr int kZeroAt = 32;
constexpr int kSignedAt = 16;
struct SignedTable {
  alignas(64) float f32[48];
  alignas(64) uint16_t bf16[48];
  constexpr SignedTable() : f32(), bf16() {
    for (int i = 0; i < 48; ++i) {
      f32[i] = static_cast<float>(i - kZeroAt);
      bf16[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, f32[i]) >> 16);
    }
  }
};
constexpr SignedTable kSignedTable;

// Bytes of a 128-bit lane's 32-bit elements: where in 16 bytes the two bytes of its own scale lie.
struct LaneBytes {
  alignas(64) uint8_t bf16[64];
  alignas(64) uint8_t e8m0[64];
  alignas(64) uint8_t e8m0_pairs[2][64];  // scales 0 0 1 1, then 2 2 3 3
  alignas(64) uint32_t words[16];         // which word
  alignas(32) uint8_t e4m3[32];           // of 16-bit elements, two to a scale
  constexpr LaneBytes() : bf16(), e8m0(), e8m0_pairs(), words(), e4m3() {
    for (int i = 0; i < 16; ++i) words[i] = static_cast<uint32_t>(i / 4);
    for (int i = 0; i < 32; ++i) e4m3[i] = i % 2 == 0 ? 0x80 : static_cast<uint8_t>(i / 4);
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
struct Avx512Uint4G32Scales : Uint4Scaled<32> {
  using Scale = __m512;
  static __m512i words(const uint8_t* scales) {
    const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    return _mm512_permutexvar_epi32(_mm512_load_si512(kLaneBytes.words),
                                    _mm512_castsi128_si512(four));
  }
  static __m512 load_scale(const uint8_t* scales, int) {
    return _mm512_castsi512_ps(_mm512_andnot_si512(_mm512_set1_epi32(kZeroMask), words(scales)));
  }
  // What is added to codes for their place in kSignedTable, in each 16-bit half.
  static __m512i shifts(const uint8_t* scales) {
    const __m512i wide =
        _mm512_sub_epi32(_mm512_set1_epi32(kSignedAt),
                         _mm512_and_si512(words(scales), _mm512_set1_epi32(kZeroMask)));
    return _mm512_or_si512(_mm512_and_si512(wide, _mm512_set1_epi32(0xFFFF)),
                           _mm512_slli_epi32(wide, 16));
  }
};
struct Avx512Uint4G128Scales : Uint4Scaled<128> {
  using Scale = __m512;
  static __m512 load_scale(const uint8_t* scales, int) {
    return _mm512_set1_ps(load_f32_of_word(scales));
  }
};
// Eight scales of a block, two 32-bit lanes each: E4M3 shifted into FP16's fields is 2^-8 of it.
struct Avx512Nvfp4Scales : Nvfp4Scaled {
  using Scale = __m512;
  static __m512 load_scale(const uint8_t* scales, int) {
    int64_t bits;
    __builtin_memcpy(&bits, scales, 8);
    const __m256i bytes =
        _mm256_shuffle_epi8(_mm256_set1_epi64x(bits),
                            _mm256_load_si256(reinterpret_cast<const __m256i*>(kLaneBytes.e4m3)));
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(bytes, 1),
                                          _mm256_set1_epi16(static_cast<short>(0xBF80)));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
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

struct Avx512Uint4G32 : Avx512Nibbles<kInt4Table> {
  static void decode(const uint8_t* src, const uint8_t* scales, int, __m512 (&out)[8]) {
    const __m512i codes = _mm512_loadu_si512(src);
    const __m512i zeros =
        _mm512_and_si512(Avx512Uint4G32Scales::words(scales), _mm512_set1_epi32(kZeroMask));
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, static_cast<unsigned>(4 * j)),
                                            _mm512_set1_epi32(15));
      out[j] = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, zeros));
    }
  }
};
struct Avx512Uint4G128 : Avx512Nibbles<kInt4Table> {
  static void decode(const uint8_t* src, const uint8_t* scales, int, __m512 (&out)[8]) {
    const __m512i codes = _mm512_loadu_si512(src);
    const __m512 table = _mm512_loadu_ps(kSignedTable.f32 + kZeroAt - load_zero(scales));
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      out[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, static_cast<unsigned>(4 * j)), table);
    }
  }
};

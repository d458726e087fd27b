// E4M3FN to BF16 by table: two vpermi2b on the low seven bits give the value's two bytes, all codes
// exact, NaN and subnormals included (every E4M3 subnormal is a normal BF16). Included inside an
// anonymous namespace of the files that may use AVX512_VBMI, after format_bits.inl.
struct Fp8Bytes {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
  constexpr Fp8Bytes() : low(), high() {
    for (uint32_t code = 0; code < 128; ++code) {
      low[code] = static_cast<uint8_t>(fp8_e4m3_bits(code) >> 16);
      high[code] = static_cast<uint8_t>(fp8_e4m3_bits(code) >> 24);
    }
  }
};
constexpr Fp8Bytes kFp8Bytes;

// 64 codes to two vectors of 32 BF16. The bytes are interleaved within 128-bit lanes: each vector
// holds eight columns of every sixteen (fp8_bf16_column in format_bits.inl says which).
inline void fp8_to_bf16(const void* src, __m512i& first, __m512i& second) {
  __m512i codes = _mm512_loadu_si512(src);
  // The compiler would load the codes once for each use that overwrites them, and loads are what
  // limits this loop; copies of registers are free.
  asm("" : "+v"(codes));
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kFp8Bytes.low), codes,
                                               _mm512_load_si512(kFp8Bytes.low + 64));
  const __m512i magnitude = _mm512_permutex2var_epi8(_mm512_load_si512(kFp8Bytes.high), codes,
                                                     _mm512_load_si512(kFp8Bytes.high + 64));
  // magnitude | (codes & sign bit)
  const __m512i high =
      _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xF8);
  first = _mm512_unpacklo_epi8(low, high);
  second = _mm512_unpackhi_epi8(low, high);
}

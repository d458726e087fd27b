// The block form's packing for BF16 products: pairs of elements side by side in a 32-bit lane, as
// vdpbf16ps and the tiles of AMX take them. Included between attention_core.inl (of AVX-512) and
// attention_block.inl; the file then defines score_block and value_block.

using Elem = uint16_t;
constexpr int64_t kTransposed = 16;  // keys, and pairs of elements, of one transposition

// out[r] lane c = in[c] lane r, in four rounds of exchanges 1, 2, 4 and 8 lanes apart.
inline void transpose_16x16(__m512i* x) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // x[4 q + c]: columns c, c + 4, c + 8, c + 12 of rows 4 q .. 4 q + 3, one to a 128-bit lane.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xDD);
    const __m512i e = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xDD);
    t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xDD);
    t[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(d, e, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = t[i];
}

// `count` elements of a cached row from element `from` on, at most 32; zeros behind.
inline __m512i load_elements(const uint16_t* row, int64_t from, int64_t dim) {
  const int64_t left = dim - from;
  const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
  return _mm512_maskz_loadu_epi16(mask, row + from);
}

inline const uint16_t* cached_row(const CacheHead& head, int64_t slot) {
  return static_cast<const uint16_t*>(head.data) + slot * head.slot_stride;
}

inline void pack_keys(const BlockCall& call, int64_t begin, int64_t count, uint16_t* keys) {
  for (int64_t s = 0; s < kBlockKeys; s += kTransposed) {
    const uint16_t* rows[kTransposed];
    for (int64_t i = 0; i < kTransposed; ++i) {
      rows[i] = s + i < count ? cached_row(call.keys, slot_of(call, begin + s + i)) : nullptr;
      if (begin + s + i + kBlockKeys < call.end) {
        prefetch_row(call.keys, slot_of(call, begin + s + i + kBlockKeys), call.head_dim);
      }
    }
    for (int64_t h = 0; h < call.q_ld; h += 2 * kTransposed) {
      __m512i x[kTransposed];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTransposed; ++i) {
        x[i] =
            rows[i] == nullptr ? _mm512_setzero_si512() : load_elements(rows[i], h, call.head_dim);
      }
      transpose_16x16(x);
      for (int64_t i = 0; i < kTransposed; ++i) {
        _mm512_store_si512(keys + ((h / 2 + i) * kBlockKeys + s) * 2, x[i]);
      }
    }
  }
}

inline void pack_values(const BlockCall& call, int64_t begin, int64_t from, int64_t to,
                        uint16_t* values) {
  const CacheHead& head = call.values.data != nullptr ? call.values : call.keys;
  auto row_of = [&](int64_t s) -> const uint16_t* {
    return s >= from && s < to ? cached_row(head, slot_of(call, begin + s)) : nullptr;
  };
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t s = 0; s < kBlockKeys; s += 2) {
    const uint16_t* a = row_of(s);
    const uint16_t* b = row_of(s + 1);
    uint16_t* out = values + s * call.v_ld;
    for (int64_t v = 0; v < call.v_ld; v += 32) {
      const __m512i zero = _mm512_setzero_si512();
      const __m512i x = a == nullptr ? zero : load_elements(a, v, call.v_dim);
      const __m512i y = b == nullptr ? zero : load_elements(b, v, call.v_dim);
      _mm512_store_si512(out + 2 * v, _mm512_permutex2var_epi16(x, low, y));
      _mm512_store_si512(out + 2 * v + 32, _mm512_permutex2var_epi16(x, high, y));
    }
  }
}

inline void store_weights(const __m512* x, uint16_t* p) {
#pragma GCC unroll 4
  for (int i = 0; i < kBlockKeys / 32; ++i) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(x[2 * i + 1], x[2 * i]);
    _mm512_store_si512(p + 32 * i, reinterpret_cast<__m512i>(rounded));
  }
}

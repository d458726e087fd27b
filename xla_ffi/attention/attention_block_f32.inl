// The block form in FP32, for instruction sets without a BF16 product and for FP32 caches. Included
// between attention_core.inl and attention_block.inl.

using Elem = float;

// keys[h][s]: a block's keys side by side, so that a vector holds one element of many keys.
inline void pack_keys(const BlockCall& call, int64_t begin, int64_t count, float* keys) {
  for (int64_t s = 0; s < count; ++s) {
    decode_row(call.keys, slot_of(call, begin + s), call.head_dim, call.row);
    if (begin + s + kBlockKeys < call.end) {
      prefetch_row(call.keys, slot_of(call, begin + s + kBlockKeys), call.head_dim);
    }
    for (int64_t h = 0; h < call.head_dim; ++h) keys[h * kBlockKeys + s] = call.row[h];
  }
  // Scores of keys that are not there are never looked at, but must not trap or be slow.
  for (int64_t h = 0; h < call.head_dim; ++h) {
    for (int64_t s = count; s < kBlockKeys; ++s) keys[h * kBlockKeys + s] = 0.0f;
  }
}

inline void pack_values(const BlockCall& call, int64_t begin, int64_t from, int64_t to,
                        float* values) {
  const CacheHead& head = call.values.data != nullptr ? call.values : call.keys;
  for (int64_t s = 0; s < kBlockKeys; ++s) {
    float* row = values + s * call.v_ld;
    int64_t filled = 0;
    if (s >= from && s < to) {
      decode_row(head, slot_of(call, begin + s), call.v_dim, row);
      filled = padded_dim(call.v_dim);
    }
    for (int64_t v = filled; v < call.v_ld; ++v) row[v] = 0.0f;
  }
}

inline void store_weights(const V* x, float* p) {
  for (int64_t i = 0; i < kBlockKeys / kWidth; ++i) store(p + i * kWidth, x[i]);
}

// sums[i][n] += a[i, k] * b[k, n], k ascending: a tile of kTileQueries rows and N vectors.
template <int N>
inline void product_tile(const float* a, int64_t a_ld, const float* b, int64_t b_ld, int64_t k_dim,
                         float* c, int64_t c_ld, bool add_to) {
  V sum[kTileQueries][N];
#pragma GCC unroll 4
  for (int i = 0; i < kTileQueries; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sum[i][n] = add_to ? load(c + i * c_ld + n * kWidth) : set1(0.0f);
    }
  }
  for (int64_t k = 0; k < k_dim; ++k) {
    V right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load(b + k * b_ld + n * kWidth);
#pragma GCC unroll 4
    for (int i = 0; i < kTileQueries; ++i) {
      const V left = set1(a[i * a_ld + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[i][n] = fma(left, right[n], sum[i][n]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTileQueries; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + i * c_ld + n * kWidth, sum[i][n]);
  }
}

inline void product(const float* a, int64_t a_ld, const float* b, int64_t b_ld, int64_t m,
                    int64_t n, int64_t k, float* c, int64_t c_ld, bool add_to) {
  for (int64_t i = 0; i < m; i += kTileQueries) {
    int64_t j = 0;
    for (; j + kTileVectors * kWidth <= n; j += kTileVectors * kWidth) {
      product_tile<kTileVectors>(a + i * a_ld, a_ld, b + j, b_ld, k, c + i * c_ld + j, c_ld,
                                 add_to);
    }
    for (; j < n; j += kWidth) {
      product_tile<1>(a + i * a_ld, a_ld, b + j, b_ld, k, c + i * c_ld + j, c_ld, add_to);
    }
  }
}

inline void score_block(const float* q, int64_t m, int64_t q_ld, const float* keys, float* scores) {
  product(q, q_ld, keys, kBlockKeys, m, kBlockKeys, q_ld, scores, kBlockKeys, false);
}

inline void value_block(const float* p, int64_t m, const float* values, int64_t v_ld, float* acc) {
  product(p, kBlockKeys, values, v_ld, m, v_ld, kBlockKeys, acc, v_ld, true);
}

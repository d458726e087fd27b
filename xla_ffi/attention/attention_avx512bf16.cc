#include "attention/attention_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace jaxmoe::attention_isa {
namespace {

#include "attention/vector_avx512.inl"
//
#include "attention/attention_core.inl"
//
#include "attention/attention_block_bf16.inl"

inline int64_t block_q_ld(int64_t dim) { return (dim + 31) / 32 * 32; }
inline int64_t block_v_ld(int64_t dim) { return (dim + 31) / 32 * 32; }

// c[i, n] (+)= a[i, k] * b[k, n] over pairs of k: Q rows and N vectors of 16 columns. a: [*, a_ld]
// elements; b: [k / 2][b_ld][2].
template <int Q, int N>
inline void product_tile(const uint16_t* a, int64_t a_ld, const uint16_t* b, int64_t b_ld,
                         int64_t k_dim, float* c, int64_t c_ld, bool add_to) {
  __m512 sum[Q][N];
#pragma GCC unroll 6
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sum[i][n] = add_to ? load(c + i * c_ld + n * kWidth) : _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < k_dim; k += 2) {
    __m512bh right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      right[n] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + (k / 2 * b_ld + n * kWidth) * 2));
    }
#pragma GCC unroll 6
    for (int i = 0; i < Q; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, a + i * a_ld + k, sizeof(pair));
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[i][n] = _mm512_dpbf16_ps(sum[i][n], left, right[n]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + i * c_ld + n * kWidth, sum[i][n]);
  }
}

// 6 x 4 sums, 4 operands and one row's pair: 29 of 32 registers. m is even.
inline void product(const uint16_t* a, int64_t a_ld, const uint16_t* b, int64_t b_ld, int64_t m,
                    int64_t k, float* c, bool add_to) {
  for (int64_t n = 0; n < b_ld;) {
    const bool wide = n + 4 * kWidth <= b_ld;
    for (int64_t i = 0; i < m;) {
      const int64_t rows = i + 6 <= m ? 6 : 2;
      auto* tile = rows == 6 ? (wide ? product_tile<6, 4> : product_tile<6, 2>)
                             : (wide ? product_tile<2, 4> : product_tile<2, 2>);
      tile(a + i * a_ld, a_ld, b + 2 * n, b_ld, k, c + i * b_ld + n, b_ld, add_to);
      i += rows;
    }
    n += wide ? 4 * kWidth : 2 * kWidth;
  }
}

inline void score_block(const uint16_t* q, int64_t m, int64_t q_ld, const uint16_t* keys,
                        float* scores) {
  product(q, q_ld, keys, kBlockKeys, m, q_ld, scores, false);
}

inline void value_block(const uint16_t* p, int64_t m, const uint16_t* values, int64_t v_ld,
                        float* acc) {
  product(p, kBlockKeys, values, v_ld, m, kBlockKeys, acc, true);
}

#include "attention/attention_block.inl"

}  // namespace

AttentionKernels avx512bf16_kernels() {
  return {"attention_avx512bf16", padded_dim, attend_chunk, merge,     finish,
          attend_block,           true,       block_q_ld,   block_v_ld};
}

}  // namespace jaxmoe::attention_isa

#else

namespace jaxmoe::attention_isa {
AttentionKernels avx512bf16_kernels() { return scalar_kernels(); }
}  // namespace jaxmoe::attention_isa

#endif

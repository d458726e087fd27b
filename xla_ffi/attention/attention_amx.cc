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

// Tiles of 16 rows of 64 bytes, as kernel_thread_init configured them: 16 rows of c by 2 x 16
// columns at a time. a: [*, a_ld] elements; b: [k / 2][b_ld][2]; k a multiple of 32.
inline void product(const uint16_t* a, int64_t a_ld, const uint16_t* b, int64_t b_ld, int64_t m,
                    int64_t k_dim, float* c, bool add_to) {
  const int64_t a_bytes = a_ld * 2, b_bytes = b_ld * 4, c_bytes = b_ld * 4;
  for (int64_t n = 0; n < b_ld; n += 32) {
    int64_t i = 0;
    for (; i + 32 <= m; i += 32) {
      float* c0 = c + i * b_ld + n;
      float* c1 = c0 + 16 * b_ld;
      if (add_to) {
        _tile_loadd(0, c0, c_bytes);
        _tile_loadd(1, c0 + 16, c_bytes);
        _tile_loadd(2, c1, c_bytes);
        _tile_loadd(3, c1 + 16, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < k_dim; k += 32) {
        _tile_loadd(4, a + i * a_ld + k, a_bytes);
        _tile_loadd(5, a + (i + 16) * a_ld + k, a_bytes);
        _tile_loadd(6, b + (k / 2 * b_ld + n) * 2, b_bytes);
        _tile_loadd(7, b + (k / 2 * b_ld + n + 16) * 2, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c0, c_bytes);
      _tile_stored(1, c0 + 16, c_bytes);
      _tile_stored(2, c1, c_bytes);
      _tile_stored(3, c1 + 16, c_bytes);
    }
    if (i < m) {
      float* c0 = c + i * b_ld + n;
      if (add_to) {
        _tile_loadd(0, c0, c_bytes);
        _tile_loadd(1, c0 + 16, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
      }
      for (int64_t k = 0; k < k_dim; k += 32) {
        _tile_loadd(4, a + i * a_ld + k, a_bytes);
        _tile_loadd(6, b + (k / 2 * b_ld + n) * 2, b_bytes);
        _tile_loadd(7, b + (k / 2 * b_ld + n + 16) * 2, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, c0, c_bytes);
      _tile_stored(1, c0 + 16, c_bytes);
    }
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

AttentionKernels amx_kernels() {
  return {"attention_amx", padded_dim, attend_chunk, merge,     finish,
          attend_block,    true,       block_q_ld,   block_v_ld};
}

}  // namespace jaxmoe::attention_isa

#else

namespace jaxmoe::attention_isa {
AttentionKernels amx_kernels() { return scalar_kernels(); }
}  // namespace jaxmoe::attention_isa

#endif

// Convolution and gated delta rule, included inside the anonymous namespace of each instruction
// set's file after simd_*.inl and kChains.
//
// Every output is one chain over taps, or four over keys (k modulo 4) that are added in a fixed
// order, whatever tile of columns and whatever run of tokens it is computed in.

#include "attention/vexp.inl"

void convolve(const ConvCall& call) {
  for (int64_t c = call.begin; c < call.end; c += kWidth) {
    V sum = mul(load(call.inputs[0] + c), load(call.weight + c));
    for (int64_t w = 1; w < call.width; ++w) {
      sum = fma(load(call.inputs[w] + c), load(call.weight + w * call.weight_ld + c), sum);
    }
    // silu; exp(88) is finite, and x / exp(88) is all that is left there.
    const V e = vexp(sub(set1(0.0f), max(sum, set1(-88.0f))));
    store(call.out + c, div(sum, add(set1(1.0f), e)));
  }
}

void normalize(float* x, int64_t n, float eps, float scale) {
  V sum = set1(0.0f);
  for (int64_t i = 0; i < n; i += kWidth) {
    const V v = load(x + i);
    sum = fma(v, v, sum);
  }
  const float factor = scale / __builtin_sqrtf(hsum(sum) + eps);
  for (int64_t i = 0; i < n; i += kWidth) store(x + i, mul(load(x + i), set1(factor)));
}

// One token on N vectors of columns from `column` on.
template <int N>
inline void update_tile(const DeltaCall& call, int64_t column, const float* q, const float* k,
                        const float* v, float decay, float rate, float* out) {
  float* const block = call.block + column;
  V sum[kChains][N];
#pragma GCC unroll 4
  for (int j = 0; j < kChains; ++j) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[j][n] = set1(0.0f);
  }
  for (int64_t i = 0; i < call.key_dim; i += kChains) {
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      const float* row = block + (i + j) * call.columns;
      const V key = set1(k[i + j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[j][n] = fma(load(row + n * kWidth), key, sum[j][n]);
    }
  }
  V change[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const V predicted = mul(add(add(sum[0][n], sum[1][n]), add(sum[2][n], sum[3][n])), set1(decay));
    change[n] = mul(sub(load(v + column + n * kWidth), predicted), set1(rate));
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) sum[j][n] = set1(0.0f);
  }
  for (int64_t i = 0; i < call.key_dim; i += kChains) {
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      float* row = block + (i + j) * call.columns;
      const V key = set1(k[i + j]), query = set1(q[i + j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const V cell = fma(key, change[n], mul(load(row + n * kWidth), set1(decay)));
        store(row + n * kWidth, cell);
        sum[j][n] = fma(cell, query, sum[j][n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    store(out + column + n * kWidth, add(add(sum[0][n], sum[1][n]), add(sum[2][n], sum[3][n])));
  }
}

void update(const DeltaCall& call) {
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    const float* q = call.q + t * call.stride;
    const float* k = call.k + t * call.stride;
    const float* v = call.v + t * call.stride;
    const float decay = call.decay[t * call.scalar_stride];
    const float rate = call.rate[t * call.scalar_stride];
    float* out = call.out + t * call.out_stride;
    int64_t column = 0;
    for (; column + 2 * kWidth <= call.columns; column += 2 * kWidth) {
      update_tile<2>(call, column, q, k, v, decay, rate, out);
    }
    if (column < call.columns) update_tile<1>(call, column, q, k, v, decay, rate, out);
  }
}

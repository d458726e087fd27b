// Attention of many queries over one chunk of cached positions: a product of matrices a block.
//
// Included after attention_core.inl by files that also define
//   Elem, kPair              what keys, values, queries and weights are multiplied as, and how many
//                            of them a lane takes at once (BF16: 2, FP32: 1)
//   score_block(q, m, q_ld, keys, scores)     scores[i, s] of all keys of a block
//   value_block(p, m, values, v_ld, acc)      acc[i, :] += sum over s of p[i, s] * values[s, :]
//   pack_keys(call, begin, count, keys)       as [q_ld / kPair][kBlockKeys][kPair]
//   pack_values(call, begin, from, to, values)    as [kBlockKeys / kPair][v_ld][kPair]
//   store_weights(V x[kBlockKeys / kWidth], p)    one row's weights as Elem
//
// What a query computes depends on its own vector and the positions it sees alone. Blocks lie on a
// grid of absolute positions; every query multiplies whole blocks, where positions it does not see
// have weight zero, so that its sums are the same chains whatever queries are beside it. Zero times
// what another query's position holds is zero unless that is NaN or infinite: such blocks are
// multiplied token by token, unseen values replaced by zeros.

inline bool sees(const BlockCall& call, int64_t i, int64_t begin, int64_t block, int64_t* from,
                 int64_t* to) {
  const int64_t first = call.first[i] - begin, end = call.visible[i] - begin;
  *from = first < 0 ? 0 : first;
  *to = end < block ? end : block;
  return *from < *to;
}

// The scores of a row, scaled, become weights; what is not seen gets none. Returns the factor for
// what was summed before.
inline float block_softmax(float* scores, float scale, int64_t from, int64_t to, float* running_max,
                           float* running_sum, Elem* weights) {
  constexpr int kVectors = kBlockKeys / kWidth;
  V x[kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) x[i] = mul(load(scores + i * kWidth), set1(scale));
  if (from > 0 || to < kBlockKeys) {
    for (int i = 0; i < kVectors; ++i) store(scores + i * kWidth, x[i]);
    for (int64_t s = 0; s < from; ++s) scores[s] = kMinusInfinity;
    for (int64_t s = to; s < kBlockKeys; ++s) scores[s] = kMinusInfinity;
    for (int i = 0; i < kVectors; ++i) x[i] = load(scores + i * kWidth);
  }
  V top = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < kVectors; ++i) top = max(top, x[i]);
  const float block_max = hmax(top);
  const float new_max = block_max > *running_max ? block_max : *running_max;
  float factor = 1.0f;
  if (*running_max == kMinusInfinity) {
    factor = 0.0f;
  } else if (!(new_max == *running_max)) {
    factor = exp_one(*running_max - new_max);
  }
  V sum = set1(0.0f);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    x[i] = vexp(sub(x[i], set1(new_max)));
    sum = add(sum, x[i]);
  }
  store_weights(x, weights);
  *running_max = new_max;
  *running_sum = *running_sum * factor + hsum(sum);
  return factor;
}

inline bool all_finite(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if ((__builtin_bit_cast(uint32_t, x[i]) & 0x7F800000u) == 0x7F800000u) return false;
  }
  return true;
}

inline bool all_finite(const uint16_t* x, int64_t n) {
  // Branch-free, so that it vectorises: whether any exponent is all ones.
  uint16_t found = 0;
  for (int64_t i = 0; i < n; ++i) found |= static_cast<uint16_t>((x[i] & 0x7F80) == 0x7F80);
  return found == 0;
}

void attend_block(const BlockCall& call, const SoftmaxState& state) {
  Elem* keys = static_cast<Elem*>(call.keys_packed);
  Elem* values = static_cast<Elem*>(call.values_packed);
  Elem* weights = static_cast<Elem*>(call.weights);
  const Elem* q = static_cast<const Elem*>(call.q);
  // Rows beyond m complete a tile: their scores and sums are computed and never read.
  const int64_t rows = (call.m + kBlockRows - 1) / kBlockRows * kBlockRows;
  for (int64_t i = 0; i < call.m; ++i) {
    state.max[i] = kMinusInfinity;
    state.sum[i] = 0.0f;
  }
  __builtin_memset(state.acc, 0, static_cast<size_t>(rows * call.v_ld) * sizeof(float));
  for (int64_t begin = call.begin; begin < call.end; begin += kBlockKeys) {
    const int64_t block = call.end - begin < kBlockKeys ? call.end - begin : kBlockKeys;
    pack_keys(call, begin, block, keys);
    score_block(q, rows, call.q_ld, keys, call.scores);
    pack_values(call, begin, 0, block, values);
    bool whole = true;  // every query sees the whole block, or nothing that is not finite is in it
    for (int64_t i = 0; i < call.m && whole; ++i) {
      int64_t from, to;
      whole = sees(call, i, begin, block, &from, &to) && from == 0 && to == block;
    }
    whole = whole || all_finite(values, kBlockKeys * call.v_ld);
    for (int64_t i = 0; i < rows; ++i) {
      float* scores = call.scores + i * kBlockKeys;
      Elem* p = weights + i * kBlockKeys;
      int64_t from, to;
      if (i >= call.m || !sees(call, i, begin, block, &from, &to)) {
        __builtin_memset(p, 0, kBlockKeys * sizeof(Elem));
        continue;
      }
      const float factor =
          block_softmax(scores, call.scale, from, to, state.max + i, state.sum + i, p);
      if (factor == 1.0f) continue;
      float* acc = state.acc + i * call.v_ld;
      for (int64_t v = 0; v < call.v_ld; v += kWidth) {
        store(acc + v, mul(load(acc + v), set1(factor)));
      }
    }
    if (whole) {
      value_block(weights, rows, values, call.v_ld, state.acc);
      continue;
    }
    // One tile of rows at a time, alone with the values its row sees.
    for (int64_t i = 0; i < call.m; ++i) {
      int64_t from, to;
      if (!sees(call, i, begin, block, &from, &to)) continue;
      pack_values(call, begin, from, to, values);
      Elem* p = static_cast<Elem*>(call.weights_alone);
      __builtin_memset(p, 0, static_cast<size_t>(kBlockRows * kBlockKeys) * sizeof(Elem));
      __builtin_memcpy(p, weights + i * kBlockKeys, kBlockKeys * sizeof(Elem));
      __builtin_memcpy(call.acc_alone, state.acc + i * call.v_ld,
                       static_cast<size_t>(call.v_ld) * sizeof(float));
      value_block(p, kBlockRows, values, call.v_ld, call.acc_alone);
      __builtin_memcpy(state.acc + i * call.v_ld, call.acc_alone,
                       static_cast<size_t>(call.v_ld) * sizeof(float));
    }
  }
}

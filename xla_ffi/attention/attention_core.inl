// Attention of a few queries over one chunk of cached positions, online softmax block by block.
//
// Included inside the anonymous namespace of each instruction set's file, which first defines
//   the vectors of simd_*.inl (kKeyBlock is a multiple of their lanes)
//   Constant<N>, kScoreKeys   keys of a score tile
//
// What a query computes depends on its own vector and on the positions it sees alone: every dot
// product is one chain of lanes over the head dimension, every output element one chain over
// positions, whatever the tile it is computed in; blocks a query does not see leave its state
// untouched.

constexpr int64_t kTileQueries = 4;
constexpr float kMinusInfinity = -__builtin_inff();

#include "attention/vexp.inl"

inline float exp_one(float x) {
  float lanes[kWidth];
  store(lanes, vexp(set1(x)));
  return lanes[0];
}

int64_t padded_dim(int64_t dim) { return (dim + kWidth - 1) / kWidth * kWidth; }

// One position's vector as FP32, zero-padded to whole vectors.
inline void decode_row(const CacheHead& head, int64_t slot, int64_t dim, float* out) {
  int64_t i = 0;
  if (head.type == ActivationType::kBf16) {
    const uint16_t* row = static_cast<const uint16_t*>(head.data) + slot * head.slot_stride;
    for (; i + kWidth <= dim; i += kWidth) store(out + i, widen(row + i));
    for (; i < dim; ++i) {
      out[i] = __builtin_bit_cast(float, static_cast<uint32_t>(row[i]) << 16);
    }
  } else {
    const float* row = static_cast<const float*>(head.data) + slot * head.slot_stride;
    for (; i + kWidth <= dim; i += kWidth) store(out + i, load(row + i));
    for (; i < dim; ++i) out[i] = row[i];
  }
  for (; i % kWidth != 0; ++i) out[i] = 0.0f;
}

inline void prefetch_row(const CacheHead& head, int64_t slot, int64_t dim) {
  const int64_t element = head.type == ActivationType::kBf16 ? 2 : 4;
  const char* row = static_cast<const char*>(head.data) + slot * head.slot_stride * element;
  for (int64_t byte = 0; byte < dim * element; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}

// scores[i, s] of Q queries and S keys.
template <int Q, int S>
inline void score_tile(const float* q, const float* keys, int64_t ld, float* scores) {
  V sum[Q][S];
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) sum[i][s] = set1(0.0f);
  }
  for (int64_t h = 0; h < ld; h += kWidth) {
    V key[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) key[s] = load(keys + s * ld + h);
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
      const V query = load(q + i * ld + h);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sum[i][s] = fma(query, key[s], sum[i][s]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) scores[i * kKeyBlock + s] = hsum(sum[i][s]);
  }
}

// acc[i, :] = acc[i, :] * factor[i] + sum over s in [begin, end) of p[i, s] * values[s, :].
template <int Q, int N>
inline void value_tile(const float* p, const float* values, int64_t value_ld, int64_t begin,
                       int64_t end, const float* factor, float* acc, int64_t acc_ld) {
  V sum[Q][N];
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sum[i][n] = mul(load(acc + i * acc_ld + n * kWidth), set1(factor[i]));
    }
  }
  for (int64_t s = begin; s < end; ++s) {
    V value[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) value[n] = load(values + s * value_ld + n * kWidth);
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
      const V weight = set1(p[i * kKeyBlock + s]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[i][n] = fma(weight, value[n], sum[i][n]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(acc + i * acc_ld + n * kWidth, sum[i][n]);
  }
}

template <int Q>
inline void add_values(const float* p, const float* values, int64_t value_ld, int64_t begin,
                       int64_t end, const float* factor, float* acc, int64_t acc_ld) {
  constexpr int N = Q == 1 ? 4 : 2;
  int64_t v = 0;
  for (; v + N * kWidth <= acc_ld; v += N * kWidth) {
    value_tile<Q, N>(p, values + v, value_ld, begin, end, factor, acc + v, acc_ld);
  }
  for (; v < acc_ld; v += kWidth) {
    value_tile<Q, 1>(p, values + v, value_ld, begin, end, factor, acc + v, acc_ld);
  }
}

// Turns scores of the block's first `seen` keys into weights; returns what the state so far is to
// be multiplied with.
inline float softmax_row(float* scores, int64_t seen, float* running_max, float* running_sum) {
  const int64_t padded = (seen + kWidth - 1) / kWidth * kWidth;
  for (int64_t s = seen; s < padded; ++s) scores[s] = kMinusInfinity;
  V top = load(scores);
  for (int64_t s = kWidth; s < padded; s += kWidth) top = max(top, load(scores + s));
  const float block_max = hmax(top);
  const float new_max = block_max > *running_max ? block_max : *running_max;
  const float factor = *running_max == kMinusInfinity ? 0.0f : exp_one(*running_max - new_max);
  V sum = set1(0.0f);
  for (int64_t s = 0; s < padded; s += kWidth) {
    const V p = vexp(sub(load(scores + s), set1(new_max)));
    store(scores + s, p);
    sum = add(sum, p);
  }
  *running_max = new_max;
  *running_sum = *running_sum * factor + hsum(sum);
  return factor;
}

template <typename Call>
inline int64_t slot_of(const Call& call, int64_t position) {
  return static_cast<int64_t>(call.pages[position / call.page_size]) * call.page_size +
         position % call.page_size;
}

void attend_chunk(const ChunkCall& call, const SoftmaxState& state) {
  for (int64_t i = 0; i < call.m; ++i) {
    state.max[i] = kMinusInfinity;
    state.sum[i] = 0.0f;
  }
  __builtin_memset(state.acc, 0, static_cast<size_t>(call.m * call.v_ld) * sizeof(float));
  for (int64_t begin = call.begin; begin < call.end; begin += kKeyBlock) {
    const int64_t block = call.end - begin < kKeyBlock ? call.end - begin : kKeyBlock;
    for (int64_t s = 0; s < block; ++s) {
      const int64_t slot = slot_of(call, begin + s);
      decode_row(call.keys, slot, call.head_dim, call.key_block + s * call.q_ld);
      if (call.values.data != nullptr) {
        decode_row(call.values, slot, call.v_dim, call.value_block + s * call.v_ld);
      }
    }
    // One head's rows lie a stride of all heads apart, on scattered pages: no hardware prefetcher
    // follows. The next block arrives while this one is computed.
    for (int64_t s = begin + block; s < begin + block + kKeyBlock && s < call.end; ++s) {
      const int64_t slot = slot_of(call, s);
      prefetch_row(call.keys, slot, call.head_dim);
      if (call.values.data != nullptr) prefetch_row(call.values, slot, call.v_dim);
    }
    const float* values = call.values.data != nullptr ? call.value_block : call.key_block;
    const int64_t value_ld = call.values.data != nullptr ? call.v_ld : call.q_ld;

    int64_t i = 0;
    auto scores_of = [&](auto queries) {
      constexpr int Q = decltype(queries)::value;
      const float* q = call.q + i * call.q_ld;
      float* scores = call.scores + i * kKeyBlock;
      int64_t s = 0;
      for (; s + kScoreKeys <= block; s += kScoreKeys) {
        score_tile<Q, kScoreKeys>(q, call.key_block + s * call.q_ld, call.q_ld, scores + s);
      }
      for (; s < block; ++s) {
        score_tile<Q, 1>(q, call.key_block + s * call.q_ld, call.q_ld, scores + s);
      }
    };
    for (; i + kTileQueries <= call.m; i += kTileQueries) scores_of(Constant<kTileQueries>{});
    for (; i < call.m; ++i) scores_of(Constant<1>{});

    for (i = 0; i < call.m;) {
      const int64_t tile = i + kTileQueries <= call.m ? kTileQueries : 1;
      float factor[kTileQueries] = {};
      int64_t seen[kTileQueries] = {}, from[kTileQueries] = {};
      int64_t common = block;
      for (int64_t j = 0; j < tile; ++j) {
        const int64_t rest = call.visible[i + j] - begin;
        seen[j] = rest < 0 ? 0 : rest < block ? rest : block;
        from[j] = call.first[i + j] > begin ? call.first[i + j] - begin : 0;
        if (from[j] >= seen[j]) seen[j] = 0;
        // Queries whose window starts within the block go one by one.
        common = from[j] > 0 ? 0 : seen[j] < common ? seen[j] : common;
        if (seen[j] == 0) continue;
        float* scores = call.scores + (i + j) * kKeyBlock;
        for (int64_t s = 0; s < from[j]; ++s) scores[s] = kMinusInfinity;
        factor[j] = softmax_row(scores, seen[j], state.max + i + j, state.sum + i + j);
      }
      const float* p = call.scores + i * kKeyBlock;
      float* acc = state.acc + i * call.v_ld;
      int64_t done = 0;
      if (tile == kTileQueries && common > 0) {
        add_values<kTileQueries>(p, values, value_ld, 0, common, factor, acc, call.v_ld);
        done = common;
        for (float& f : factor) f = 1.0f;
      }
      for (int64_t j = 0; j < tile; ++j) {
        if (done < seen[j]) {
          const int64_t start = from[j] > done ? from[j] : done;
          add_values<1>(p + j * kKeyBlock, values, value_ld, start, seen[j], factor + j,
                        acc + j * call.v_ld, call.v_ld);
        }
      }
      i += tile;
    }
  }
}

void merge(int64_t m, int64_t v_ld, const SoftmaxState& total, const SoftmaxState& part) {
  for (int64_t i = 0; i < m; ++i) {
    if (part.max[i] == kMinusInfinity) continue;  // saw nothing of this chunk
    const float new_max = part.max[i] > total.max[i] ? part.max[i] : total.max[i];
    const float a = total.max[i] == kMinusInfinity ? 0.0f : exp_one(total.max[i] - new_max);
    const float b = exp_one(part.max[i] - new_max);
    total.max[i] = new_max;
    total.sum[i] = total.sum[i] * a + part.sum[i] * b;
    float* to = total.acc + i * v_ld;
    const float* from = part.acc + i * v_ld;
    for (int64_t v = 0; v < v_ld; v += kWidth) {
      store(to + v, fma(load(from + v), set1(b), mul(load(to + v), set1(a))));
    }
  }
}

void finish(int64_t m, int64_t v_dim, int64_t v_ld, const SoftmaxState& state,
            float* const* out_rows) {
  for (int64_t i = 0; i < m; ++i) {
    const float* acc = state.acc + i * v_ld;
    const V sum = set1(state.sum[i]);
    int64_t v = 0;
    for (; v + kWidth <= v_dim; v += kWidth) store(out_rows[i] + v, div(load(acc + v), sum));
    for (; v < v_dim; ++v) out_rows[i][v] = acc[v] / state.sum[i];
  }
}

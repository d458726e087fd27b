// y = x Wᵀ with the columns along the vector lanes: every kVector kernel and the vdpbf16ps kMatrix
// kernels. Included inside an anonymous namespace of each instruction set's file (see
// isa_tables.h).
//
// `Ops` supplies the arithmetic of one (format, ISA):
//   Elem, Acc, Weights        prepared element; vector of FP32 sums; vector of decoded weights
//   kElems                    prepared elements a vector
//   kGroupVecs                vectors that one decode() yields
//   kWeightBytes              bytes of one stored weight
//   kRows                     weight rows at a time
//   kTokenChunk               most activation rows a decoding serves (a multiple of three)
//   kAheadBytes               prefetch distance along a row
//   kScaled, kScaleFold       block scales; factor the decoder left out of the weights
//   column(i)                 column within a block of 128 that prepared position i holds
//   zero, load, load_acc, store_acc, store_weights, decode, mac, flush, reduce
//   Flag, any_nan             decode() marks codes that it does not decode to NaN itself
//
// Order of additions of one output: blocks of 128 columns ascending; in a block, vectors ascending,
// one FMA chain a lane; lanes summed by reduce() at the end. It depends on nothing else, so an
// output is the same bits for any m and any n range. The last block is copied and zero-padded, so
// no read passes a row's end.

// A group of kRows weight rows (the last one repeated past the end of the range).
template <class Ops>
struct RowGroup {
  static constexpr int kRows = Ops::kRows;
  static constexpr int64_t kBlockBytes = kBlock * Ops::kWeightBytes;
  // Far enough ahead to cover DRAM latency at one thread's bandwidth, shared among kRows streams.
  static constexpr int64_t kAheadBytes = Ops::kAheadBytes;

  const uint8_t* row[kRows];
  const float* scale[kRows];
  int64_t row_bytes;
  int64_t next_group_bytes;
  int64_t full_blocks;
  int64_t tail_bytes;
  alignas(64) uint8_t tail[kRows][kBlockBytes];

  RowGroup(const WeightView& w, int64_t n_begin, int64_t n_end) {
    row_bytes = w.k * Ops::kWeightBytes;
    next_group_bytes = kRows * w.row_stride_bytes - row_bytes;
    full_blocks = w.k / kBlock;
    tail_bytes = (w.k % kBlock) * Ops::kWeightBytes;
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = min_of(n_begin + r, n_end - 1);
      row[r] = w.data + n * w.row_stride_bytes;
      if constexpr (Ops::kScaled) scale[r] = w.scale + n / kScaleBlock * w.scale_stride;
      if (tail_bytes == 0) continue;
      __builtin_memset(tail[r], 0, kBlockBytes);
      __builtin_memcpy(tail[r], row[r] + full_blocks * kBlockBytes, tail_bytes);
    }
  }

  int64_t num_blocks() const { return full_blocks + (tail_bytes != 0); }

  const uint8_t* block(int r, int64_t b) const {
    return b < full_blocks ? row[r] + b * kBlockBytes : tail[r];
  }

  float block_scale(int r, int64_t b) const { return scale[r][b] * Ops::kScaleFold; }

  // Asks for the bytes that lie kAheadBytes after block b: in these rows, or in the group that
  // follows. A prefetch of an address outside the matrix does nothing.
  void prefetch(int64_t b) const {
    int64_t offset = b * kBlockBytes + kAheadBytes;
    if (offset >= row_bytes) offset += next_group_bytes;
    for (int r = 0; r < kRows; ++r) {
      for (int64_t line = 0; line < kBlockBytes; line += 64) {
        __builtin_prefetch(row[r] + offset + line, 0, 3);
      }
    }
  }

  bool row_has_nan(int r) const {
    for (int64_t i = 0; i < row_bytes; ++i) {
      if ((row[r][i] & 0x7F) == 0x7F) return true;
    }
    return false;
  }
};

// A NaN weight makes its output NaN whatever the activations, so the few groups that hold one are
// patched.
template <class Ops>
__attribute__((noinline, cold)) void patch_nan(const RowGroup<Ops>& group, int64_t rows, int64_t m,
                                               float* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r) {
    if (!group.row_has_nan(static_cast<int>(r))) continue;
    for (int64_t i = 0; i < m; ++i) y[i * ldy + r] = __builtin_nanf("");
  }
}

// One block of kRows weight rows against M activation rows, decoded weights staying in registers.
template <class Ops, int M>
inline __attribute__((always_inline)) void mac_block(const uint8_t* const (&w)[Ops::kRows],
                                                     const typename Ops::Elem* const (&x)[M],
                                                     typename Ops::Acc (&sum)[Ops::kRows][M],
                                                     typename Ops::Flag& flag) {
  constexpr int kGroupElems = Ops::kGroupVecs * Ops::kElems;
#pragma GCC unroll 4
  for (int g = 0; g < kBlock / kGroupElems; ++g) {
#pragma GCC unroll 8
    for (int r = 0; r < Ops::kRows; ++r) {
      typename Ops::Weights decoded[Ops::kGroupVecs];
      Ops::decode(w[r] + g * kGroupElems * Ops::kWeightBytes, decoded, flag);
#pragma GCC unroll 4
      for (int j = 0; j < Ops::kGroupVecs; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
          sum[r][i] =
              Ops::mac(sum[r][i], decoded[j], Ops::load(x[i] + g * kGroupElems + j * Ops::kElems));
        }
      }
    }
  }
}

// Few rows: one pass over the weights, sums in registers.
template <class Ops, int M>
void matmul_few(const WeightView& w, int64_t n_begin, int64_t n_end,
                const typename Ops::Elem* const (&x)[M], float* y, int64_t ldy) {
  constexpr int kRows = Ops::kRows;
  using Acc = typename Ops::Acc;
  for (int64_t n = n_begin; n < n_end; n += kRows) {
    const RowGroup<Ops> group(w, n, n_end);
    const int64_t rows = min_of(kRows, n_end - n);
    Acc sum[kRows][M];
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < M; ++i) sum[r][i] = Ops::zero();
    }
    typename Ops::Flag flag = {};
    const int64_t num_blocks = group.num_blocks();
    for (int64_t b = 0; b < num_blocks; ++b) {
      group.prefetch(b);
      const uint8_t* block[kRows];
      for (int r = 0; r < kRows; ++r) block[r] = group.block(r, b);
      const typename Ops::Elem* xb[M];
      for (int i = 0; i < M; ++i) xb[i] = x[i] + b * kBlock;
      if constexpr (Ops::kScaled) {
        Acc part[kRows][M];
        for (int r = 0; r < kRows; ++r) {
          for (int i = 0; i < M; ++i) part[r][i] = Ops::zero();
        }
        mac_block<Ops, M>(block, xb, part, flag);
        for (int r = 0; r < kRows; ++r) {
          const float scale = group.block_scale(r, b);
          for (int i = 0; i < M; ++i) sum[r][i] = Ops::flush(sum[r][i], part[r][i], scale);
        }
      } else {
        mac_block<Ops, M>(block, xb, sum, flag);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < M; ++i) y[i * ldy + (n - n_begin) + r] = Ops::reduce(sum[r][i]);
    }
    if (Ops::any_nan(flag)) patch_nan<Ops>(group, rows, M, y + (n - n_begin), ldy);
  }
}

// kRows x M register tile over one decoded block.
template <class Ops, int M>
inline void mac_decoded(const typename Ops::Elem* decoded, const typename Ops::Elem* const* x,
                        int64_t x_offset, const float (&scale)[Ops::kRows], float* sums) {
  constexpr int kRows = Ops::kRows;
  typename Ops::Acc tile[kRows][M];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      tile[r][i] =
          Ops::kScaled ? Ops::zero() : Ops::load_acc(sums + (i * kRows + r) * Ops::kAccFloats);
    }
  }
#pragma GCC unroll 1
  for (int v = 0; v < kBlock; v += Ops::kElems) {
    typename Ops::Weights xv[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) xv[i] = Ops::load(x[i] + x_offset + v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename Ops::Weights wv = Ops::load(decoded + r * kBlock + v);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) tile[r][i] = Ops::mac(tile[r][i], wv, xv[i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      float* sum = sums + (i * kRows + r) * Ops::kAccFloats;
      if constexpr (Ops::kScaled) {
        Ops::store_acc(sum, Ops::flush(Ops::load_acc(sum), tile[r][i], scale[r]));
      } else {
        Ops::store_acc(sum, tile[r][i]);
      }
    }
  }
}

// Many rows: each block is decoded once for up to kTokenChunk activation rows.
template <class Ops>
void matmul_many(const WeightView& w, int64_t n_begin, int64_t n_end,
                 const typename Ops::Elem* const* x, int64_t m, float* y, int64_t ldy) {
  using Elem = typename Ops::Elem;
  constexpr int kRows = Ops::kRows;
  constexpr int kGroupElems = Ops::kGroupVecs * Ops::kElems;
  alignas(64) Elem decoded[kRows * kBlock];
  alignas(64) float sums[Ops::kTokenChunk * kRows * Ops::kAccFloats];
  for (int64_t n = n_begin; n < n_end; n += kRows) {
    const RowGroup<Ops> group(w, n, n_end);
    const int64_t rows = min_of(kRows, n_end - n);
    __builtin_memset(sums, 0, static_cast<size_t>(m) * kRows * Ops::kAccFloats * sizeof(float));
    typename Ops::Flag flag = {};
    const int64_t num_blocks = group.num_blocks();
    for (int64_t b = 0; b < num_blocks; ++b) {
      group.prefetch(b);
      float scale[kRows] = {};
      for (int r = 0; r < kRows; ++r) {
        if constexpr (Ops::kScaled) scale[r] = group.block_scale(r, b);
        const uint8_t* block = group.block(r, b);
        for (int e = 0; e < kBlock; e += kGroupElems) {
          typename Ops::Weights vecs[Ops::kGroupVecs];
          Ops::decode(block + e * Ops::kWeightBytes, vecs, flag);
          for (int j = 0; j < Ops::kGroupVecs; ++j) {
            Ops::store_weights(decoded + r * kBlock + e + j * Ops::kElems, vecs[j]);
          }
        }
      }
      for (int64_t i = 0, count; i < m; i += count) {
        // Three at a time, but four as two and two.
        count = min_of(m - i == 4 ? 2 : 3, m - i);
        float* sum = sums + i * kRows * Ops::kAccFloats;
        if (count == 3) {
          mac_decoded<Ops, 3>(decoded, x + i, b * kBlock, scale, sum);
        } else if (count == 2) {
          mac_decoded<Ops, 2>(decoded, x + i, b * kBlock, scale, sum);
        } else {
          mac_decoded<Ops, 1>(decoded, x + i, b * kBlock, scale, sum);
        }
      }
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        y[i * ldy + (n - n_begin) + r] =
            Ops::reduce(Ops::load_acc(sums + (i * kRows + r) * Ops::kAccFloats));
      }
    }
    if (Ops::any_nan(flag)) patch_nan<Ops>(group, rows, m, y + (n - n_begin), ldy);
  }
}

template <class Ops>
void matmul(const WeightView& w, int64_t n_begin, int64_t n_end, const void* x,
            const int32_t* row_ids, int64_t m, float* y, int64_t ldy) noexcept {
  using Elem = typename Ops::Elem;
  const FloatMode mode;
  const size_t row_bytes = spread_row_bytes<Elem>(w.k);
  for (int64_t begin = 0; begin < m; begin += Ops::kTokenChunk) {
    const int64_t count = min_of(Ops::kTokenChunk, m - begin);
    const Elem* rows[Ops::kTokenChunk];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = row_ids == nullptr ? begin + i : row_ids[begin + i];
      rows[i] = reinterpret_cast<const Elem*>(static_cast<const char*>(x) + row * row_bytes);
    }
    float* out = y + begin * ldy;
    if (count == 1) {
      matmul_few<Ops, 1>(w, n_begin, n_end, {rows[0]}, out, ldy);
    } else if (count == 2) {
      matmul_few<Ops, 2>(w, n_begin, n_end, {rows[0], rows[1]}, out, ldy);
    } else {
      matmul_many<Ops>(w, n_begin, n_end, rows, count, out, ldy);
    }
  }
}

template <class Ops>
MatmulKernel rows_kernel(const char* name, Isa isa) {
  return {name,    isa,        spread_row_bytes<typename Ops::Elem>, prepare<Ops>, nullptr,
          nullptr, matmul<Ops>};
}

// y = x Wᵀ with the columns along the vector lanes: every kVector kernel and the vdpbf16ps kMatrix
// kernels. Included inside an anonymous namespace of each instruction set's file (see
// isa_tables.h).
//
// `Ops` supplies the arithmetic of one (format, ISA):
//   Elem, Acc, Weights        prepared element; vector of FP32 sums; vector of decoded weights
//   kElems                    prepared elements a vector
//   kGroupVecs                vectors that one decode() yields
//   kWeightBits               bits of one stored weight
//   kRows, kTokens            weight and activation rows of the many-row form's register tile
//   kTokenChunk               most activation rows a decoding serves
//   kChunkBlocks              blocks of 128 columns decoded at a time in the many-row form
//   kFewRows, kMaxFew         weight rows, and most activation rows, of the few-row form
//   one_stream_rows(m), kMaxFewOneStream    the same where memory is read as one stream
//   Unscaled, RowScaled or GroupScaled (matmul_common.inl) as a base
//   kScaleFold                factor the decoder left out of the weights
//   kShareActivations         whether the few-row form decodes all its rows before it multiplies
//   kFlushVecs, Scale         vectors of a block whose sums one flush() scales, by a Scale that
//   load_scale(scales, i)     reads: of flush i of a block, whose scales begin at `scales`
//   kScaleChunk               blocks whose scales the few-row form widens ahead, 0: as they are
//   widen_scales, load_widened, kWidenedBytes   if so; the latter of a block
//   column(i)                 column within a block of 128 that prepared position i holds
//   zero, load, load_acc, store_acc, store_weights, decode, mac, flush, reduce
//   Flag, any_nan             decode() marks codes that it does not decode to NaN itself
//   decode(src, scales, at, out)   where a group has a zero point: at is the column of a block at
//                             which src begins, scales those of the block
//
// Order of additions of one output: blocks of 128 columns ascending; in a block, vectors ascending,
// one FMA chain a lane; lanes summed by reduce() at the end. It depends on nothing else, so an
// output is the same bits for any m and any n range. The last block is copied and zero-padded, so
// no read passes a row's end.
//
// Where 32 columns share a scale, the decoder may yield vectors each 128-bit lane of which holds
// columns of one group: one flush then scales four groups, each lane by its own.

// A decoder's weights as they are, with a scale a block of E4M3, and with one a row.
template <class Decoder>
struct Plain : Decoder, Unscaled {};
template <class Decoder>
struct Blocks : Decoder, BlockScaled {
  static constexpr int kFlushVecs = kBlock / Decoder::kElems;
  static float load_scale(const uint8_t* scales, int) {
    return load_f32(scales) * Decoder::kScaleFold;
  }
};
// Sums of a block are added, as if scaled by one: shorter chains than one along the whole row.
template <class Decoder>
struct Channels : Decoder, RowScaled {
  static constexpr int kFlushVecs = kBlock / Decoder::kElems;
  static float load_scale(const uint8_t*, int) { return 1.0f; }
};

// Vectors of a block whose sums are scaled at once; all of them where none are.
template <class Ops>
constexpr int flush_vecs() {
  if constexpr (Ops::kFlushes) return Ops::kFlushVecs;
  return kBlock / Ops::kElems;
}

// Weights from column `at` of a block on, which begin at `src`.
template <class Ops>
inline __attribute__((always_inline)) void decode_at(const uint8_t* src, const uint8_t* scales,
                                                     int at,
                                                     typename Ops::Weights (&out)[Ops::kGroupVecs],
                                                     typename Ops::Flag& flag) {
  if constexpr (Ops::kZeros) {
    Ops::decode(src, scales, at, out);
  } else {
    Ops::decode(src, out, flag);
  }
}

// How weight rows are fetched ahead. kOneStream: the next groups of rows, in the order of their
// addresses, into the second-level cache; else each row for itself, into the first. Zen reads one
// stream at nearly the rate of its memory and several at half of it (measured on Zen 4); on Intel's
// it is the other way round (Sapphire and Emerald Rapids). There the few-row form takes rows
// shorter than a page that lie a share of the range apart, each of which then goes on through
// memory from row to row: the prefetcher follows one run a page, and loses it where neighbours are
// read together.
template <class Base, int R, bool OneStream>
struct Fetched : Base {
  static constexpr int kRows = R;
  static constexpr bool kOneStream = OneStream;
};

constexpr int64_t kPageBytes = 4096;  // what the hardware's prefetchers stay within

// A group of kRows weight rows, `step` apart (the range's last one repeated past its end).
template <class Ops>
struct RowGroup {
  static constexpr int kRows = Ops::kRows;
  static constexpr int64_t kBlockBytes = kBlock * Ops::kWeightBits / 8;
  // Far enough ahead to cover DRAM latency at one thread's bandwidth, shared among kRows streams.
  static constexpr int64_t kAheadBytes = 1024;
  static constexpr int64_t kScaleAheadBytes = 256;
  // One stream: at least 16 KiB, 0.5 us at 30 GB/s; a whole number of groups.
  static constexpr int64_t kStreamAheadBytes = 16 << 10;

  // Scales lie beside each row, not beside 128 of them: a second stream, of an eighth of the bytes.
  static constexpr bool kScalesOfRows = [] {
    if constexpr (Ops::kGroupScaled) return Ops::kScaleRows == 1;
    return false;
  }();

  const uint8_t* row[kRows];
  const uint8_t* scale[kRows];
  int64_t row_bytes;
  int64_t next_row_bytes;  // from a row's end to the same place's next row
  int64_t stream_ahead_bytes;
  int64_t scale_ahead_bytes;
  int64_t full_blocks;
  int64_t tail_bytes;
  float factor[kRows];  // of a row's sum, where it lies behind the scales
  alignas(64) uint8_t tail[kRows][kBlockBytes];
  alignas(16) uint8_t tail_scale[kRows][16];

  RowGroup(const WeightView& w, int64_t n_begin, int64_t n_end, int64_t step = 1) {
    row_bytes = w.k * Ops::kWeightBits / 8;
    next_row_bytes = (step == 1 ? kRows : 1) * w.row_stride_bytes - row_bytes;
    const int64_t group_bytes = kRows * w.row_stride_bytes;
    const int64_t groups_ahead = ceil_div(kStreamAheadBytes, group_bytes);
    stream_ahead_bytes = groups_ahead * group_bytes;
    if constexpr (kScalesOfRows) {
      scale_ahead_bytes = groups_ahead * kRows * w.scale_stride * Ops::kScaleBytes;
    }
    full_blocks = w.k / kBlock;
    tail_bytes = (w.k % kBlock) * Ops::kWeightBits / 8;
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = min_of(n_begin + r * step, n_end - 1);
      row[r] = w.data + n * w.row_stride_bytes;
      if constexpr (Ops::kRowScaled) scale[r] = w.scale + n * w.scale_stride * 4;
      if constexpr (Ops::kGroupScaled) {
        scale[r] = w.scale + n / Ops::kScaleRows * w.scale_stride * Ops::kScaleBytes;
      }
      if constexpr (Ops::kRowTail) factor[r] = load_row_tail(w, n);
      if (tail_bytes == 0) continue;
      __builtin_memset(tail[r], 0, kBlockBytes);
      __builtin_memcpy(tail[r], row[r] + full_blocks * kBlockBytes, tail_bytes);
      if constexpr (Ops::kGroupScaled) {
        const int64_t groups = ceil_div(w.k % kBlock, Ops::kGroupCols);
        __builtin_memset(tail_scale[r], 0, sizeof(tail_scale[r]));
        __builtin_memcpy(tail_scale[r], scale[r] + full_blocks * Ops::kBlockScaleBytes,
                         groups * Ops::kScaleBytes);
      }
    }
  }

  int64_t num_blocks() const { return full_blocks + (tail_bytes != 0); }

  const uint8_t* block(int r, int64_t b) const {
    return b < full_blocks ? row[r] + b * kBlockBytes : tail[r];
  }

  const uint8_t* block_scales(int r, int64_t b) const {
    if constexpr (Ops::kGroupScaled) {
      return b < full_blocks ? scale[r] + b * Ops::kBlockScaleBytes : tail_scale[r];
    } else {
      return scale[r];
    }
  }

  // The output that a sum of the row gives.
  float finish(int r, float sum) const {
    if constexpr (Ops::kRowScaled) return sum * (load_f32(scale[r]) * Ops::kScaleFold);
    if constexpr (Ops::kRowTail) return sum * factor[r];
    return sum;
  }

  // Asks for bytes that will be wanted later than block b. A prefetch of an address outside the
  // matrix does nothing.
  void prefetch(int64_t b) const {
    if constexpr (kScalesOfRows && !Ops::kOneStream) {
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* at = scale[r] + kScaleAheadBytes + b * Ops::kBlockScaleBytes;
        if ((reinterpret_cast<uintptr_t>(at) & 63) < Ops::kBlockScaleBytes) {
          __builtin_prefetch(at, 0, 2);
        }
      }
    } else if constexpr (kScalesOfRows) {
      const uint8_t* at = scale[0] + scale_ahead_bytes + b * kRows * Ops::kBlockScaleBytes;
      // Once a line.
      if ((reinterpret_cast<uintptr_t>(at) & 63) < kRows * Ops::kBlockScaleBytes) {
        __builtin_prefetch(at, 0, 2);
      }
    }
    if constexpr (Ops::kOneStream && kRows == 1) {
      // Hardware prefetchers follow a single row by themselves, but stop at the end of a page: the
      // first lines of the next are asked for a page ahead.
      const uint8_t* at = row[0] + b * kBlockBytes;
      if ((reinterpret_cast<uintptr_t>(at) & 4095) >= 1024) return;
      for (int64_t line = 0; line < kBlockBytes; line += 64) {
        __builtin_prefetch(at + 4096 + line, 0, 2);
      }
    } else if constexpr (Ops::kOneStream) {
      const uint8_t* at = row[0] + stream_ahead_bytes + b * kRows * kBlockBytes;
      for (int64_t line = 0; line < kRows * kBlockBytes; line += 64) {
        __builtin_prefetch(at + line, 0, 2);
      }
    } else {
      int64_t offset = b * kBlockBytes + kAheadBytes;
      if (offset >= row_bytes) offset += next_row_bytes;
      for (int r = 0; r < kRows; ++r) {
        for (int64_t line = 0; line < kBlockBytes; line += 64) {
          __builtin_prefetch(row[r] + offset + line, 0, 3);
        }
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
                                               float* y, int64_t ldy, int64_t step = 1) {
  for (int64_t r = 0; r < rows; ++r) {
    if (!group.row_has_nan(static_cast<int>(r))) continue;
    for (int64_t i = 0; i < m; ++i) y[i * ldy + r * step] = __builtin_nanf("");
  }
}

// kVecs vectors, from vector `first` of a block on, of kRows weight rows times M activation rows.
// Decoded vectors of kShared rows meet an activation vector loaded once.
template <class Ops, int M, int kVecs>
inline __attribute__((always_inline)) void mac_vectors(const uint8_t* const (&w)[Ops::kRows],
                                                       const uint8_t* const (&scales)[Ops::kRows],
                                                       const typename Ops::Elem* const (&x)[M],
                                                       int first,
                                                       typename Ops::Acc (&sum)[Ops::kRows][M],
                                                       typename Ops::Flag& flag) {
  static_assert(kVecs % Ops::kGroupVecs == 0);
  constexpr int kGroupElems = Ops::kGroupVecs * Ops::kElems;
  // Sharing pays where loads would outnumber products (narrow groups of decoded vectors).
  constexpr int kShared = Ops::kGroupVecs <= 2 || Ops::kShareActivations ? Ops::kRows : 1;
#pragma GCC unroll 4
  for (int g = first / Ops::kGroupVecs; g < (first + kVecs) / Ops::kGroupVecs; ++g) {
#pragma GCC unroll 8
    for (int begin = 0; begin < Ops::kRows; begin += kShared) {
      typename Ops::Weights decoded[kShared][Ops::kGroupVecs];
#pragma GCC unroll 8
      for (int r = 0; r < kShared; ++r) {
        decode_at<Ops>(w[begin + r] + g * kGroupElems * Ops::kWeightBits / 8, scales[begin + r],
                       g * kGroupElems, decoded[r], flag);
      }
#pragma GCC unroll 4
      for (int j = 0; j < Ops::kGroupVecs; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
          const typename Ops::Weights xv = Ops::load(x[i] + g * kGroupElems + j * Ops::kElems);
#pragma GCC unroll 8
          for (int r = 0; r < kShared; ++r) {
            sum[begin + r][i] = Ops::mac(sum[begin + r][i], decoded[r][j], xv);
          }
        }
      }
    }
  }
}

// Scales of the coming blocks in a form that costs less to load.
template <class Ops>
struct WidenedScales {
  static constexpr int kChunk = Ops::kScaleChunk;
  alignas(64) uint8_t bytes[Ops::kRows][kChunk == 0 ? 1 : kChunk * Ops::kWidenedBytes];

  void update(const RowGroup<Ops>& group, int64_t b, int64_t num_blocks) {
    if constexpr (kChunk != 0) {
      if (b % kChunk != 0) return;
      // The last block's scales may be fewer.
      const int64_t count = min_of(kChunk, num_blocks - b);
      const bool tail = b + count > group.full_blocks;
      for (int r = 0; r < Ops::kRows; ++r) {
        Ops::widen_scales(group.scale[r] + b * Ops::kBlockScaleBytes,
                          (count - tail) * Ops::kBlockScaleBytes, bytes[r]);
        if (!tail) continue;
        Ops::widen_scales(group.tail_scale[r], Ops::kBlockScaleBytes,
                          bytes[r] + (count - 1) * Ops::kWidenedBytes);
      }
    }
  }

  typename Ops::Scale load(const RowGroup<Ops>& group, int r, int64_t b, int flush) const {
    if constexpr (kChunk != 0) {
      return Ops::load_widened(bytes[r] + b % kChunk * Ops::kWidenedBytes, flush);
    } else {
      return Ops::load_scale(group.block_scales(r, b), flush);
    }
  }
};

// Few rows: one pass over the weights, sums in registers.
template <class Ops, int M>
void matmul_few(const WeightView& w, int64_t n_begin, int64_t n_end,
                const typename Ops::Elem* const (&x)[M], float* y, int64_t ldy) {
  constexpr int kRows = Ops::kRows;
  constexpr int kVecs = kBlock / Ops::kElems;
  using Acc = typename Ops::Acc;
  // Qwen3-30B's experts (rows of 2048 and 768 bytes) are read a fifth to a half faster apart,
  // DeepSeek-V3's rows of 7168 a twentieth slower (Emerald Rapids).
  const bool apart = !Ops::kOneStream && w.k * Ops::kWeightBits / 8 < kPageBytes;
  const int64_t step = apart ? ceil_div(n_end - n_begin, kRows) : 1;
  const int64_t first_end = apart ? n_begin + step : n_end;
  for (int64_t n = n_begin; n < first_end; n += apart ? 1 : kRows) {
    const RowGroup<Ops> group(w, n, n_end, step);
    const int64_t rows = min_of(kRows, ceil_div(n_end - n, step));
    Acc sum[kRows][M];
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < M; ++i) sum[r][i] = Ops::zero();
    }
    typename Ops::Flag flag = {};
    const int64_t num_blocks = group.num_blocks();
    WidenedScales<Ops> widened;
    for (int64_t b = 0; b < num_blocks; ++b) {
      group.prefetch(b);
      widened.update(group, b, num_blocks);
      const uint8_t* block[kRows];
      const uint8_t* scales[kRows] = {};
      for (int r = 0; r < kRows; ++r) {
        block[r] = group.block(r, b);
        if constexpr (Ops::kZeros) scales[r] = group.block_scales(r, b);
      }
      const typename Ops::Elem* xb[M];
      for (int i = 0; i < M; ++i) xb[i] = x[i] + b * kBlock;
      if constexpr (Ops::kFlushes) {
#pragma GCC unroll 4
        for (int f = 0; f < kVecs / Ops::kFlushVecs; ++f) {
          Acc part[kRows][M];
          for (int r = 0; r < kRows; ++r) {
            for (int i = 0; i < M; ++i) part[r][i] = Ops::zero();
          }
          mac_vectors<Ops, M, Ops::kFlushVecs>(block, scales, xb, f * Ops::kFlushVecs, part, flag);
          for (int r = 0; r < kRows; ++r) {
            const typename Ops::Scale scale = widened.load(group, r, b, f);
            for (int i = 0; i < M; ++i) sum[r][i] = Ops::flush(sum[r][i], part[r][i], scale);
          }
        }
      } else {
        mac_vectors<Ops, M, kVecs>(block, scales, xb, 0, sum, flag);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < M; ++i) {
        y[i * ldy + (n - n_begin) + r * step] = group.finish(r, Ops::reduce(sum[r][i]));
      }
    }
    if (Ops::any_nan(flag)) patch_nan<Ops>(group, rows, M, y + (n - n_begin), ldy, step);
  }
}

// kRows x M register tile over the decoded blocks of a chunk; `sums` holds the tile's sums so far,
// activation rows first.
template <class Ops, int M>
inline void mac_decoded(const typename Ops::Elem* decoded, int64_t num_blocks,
                        const typename Ops::Elem* const* x, int64_t x_offset,
                        const typename Ops::Scale (*scale)[Ops::kRows], float* sums) {
  constexpr int kRows = Ops::kRows;
  constexpr int kFlushElems = flush_vecs<Ops>() * Ops::kElems;
  constexpr int64_t kRowElems = Ops::kChunkBlocks * kBlock;
  typename Ops::Acc sum[kRows][M];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) sum[r][i] = Ops::load_acc(sums + (i * kRows + r) * Ops::kAccFloats);
  }
  for (int64_t begin = 0; begin < num_blocks * kBlock; begin += kFlushElems, ++scale) {
    typename Ops::Acc part[kRows][M];
    if constexpr (Ops::kFlushes) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) part[r][i] = Ops::zero();
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kFlushElems; v += Ops::kElems) {
      typename Ops::Weights xv[M];
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) xv[i] = Ops::load(x[i] + x_offset + begin + v);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename Ops::Weights wv = Ops::load(decoded + r * kRowElems + begin + v);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
          auto& acc = Ops::kFlushes ? part[r][i] : sum[r][i];
          acc = Ops::mac(acc, wv, xv[i]);
        }
      }
    }
    if constexpr (Ops::kFlushes) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) sum[r][i] = Ops::flush(sum[r][i], part[r][i], (*scale)[r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) Ops::store_acc(sums + (i * kRows + r) * Ops::kAccFloats, sum[r][i]);
  }
}

// Many rows: each chunk of columns is decoded once for up to kTokenChunk activation rows.
template <class Ops>
void matmul_many(const WeightView& w, int64_t n_begin, int64_t n_end,
                 const typename Ops::Elem* const* x, int64_t m, float* y, int64_t ldy) {
  using Elem = typename Ops::Elem;
  constexpr int kRows = Ops::kRows;
  constexpr int kGroupElems = Ops::kGroupVecs * Ops::kElems;
  constexpr int64_t kRowElems = Ops::kChunkBlocks * kBlock;
  alignas(64) Elem decoded[kRows * kRowElems];
  alignas(64) float sums[Ops::kTokenChunk * kRows * Ops::kAccFloats];
  // Scales of the flushes of a chunk; not used by other formats.
  constexpr int kFlushes = kBlock / Ops::kElems / flush_vecs<Ops>();
  typename Ops::Scale scale[Ops::kChunkBlocks * kFlushes][kRows];
  for (int64_t n = n_begin; n < n_end; n += kRows) {
    const RowGroup<Ops> group(w, n, n_end);
    const int64_t rows = min_of(kRows, n_end - n);
    __builtin_memset(sums, 0, static_cast<size_t>(m) * kRows * Ops::kAccFloats * sizeof(float));
    typename Ops::Flag flag = {};
    const int64_t num_blocks = group.num_blocks();
    for (int64_t first = 0; first < num_blocks; first += Ops::kChunkBlocks) {
      const int64_t count = min_of(Ops::kChunkBlocks, num_blocks - first);
      for (int64_t b = 0; b < count; ++b) {
        group.prefetch(first + b);
        for (int r = 0; r < kRows; ++r) {
          if constexpr (Ops::kFlushes) {
            for (int f = 0; f < kFlushes; ++f) {
              scale[b * kFlushes + f][r] = Ops::load_scale(group.block_scales(r, first + b), f);
            }
          }
          const uint8_t* block = group.block(r, first + b);
          const uint8_t* scales = nullptr;
          if constexpr (Ops::kZeros) scales = group.block_scales(r, first + b);
          for (int e = 0; e < kBlock; e += kGroupElems) {
            typename Ops::Weights vecs[Ops::kGroupVecs];
            decode_at<Ops>(block + e * Ops::kWeightBits / 8, scales, e, vecs, flag);
            for (int j = 0; j < Ops::kGroupVecs; ++j) {
              Ops::store_weights(decoded + r * kRowElems + b * kBlock + e + j * Ops::kElems,
                                 vecs[j]);
            }
          }
        }
      }
      for (int64_t i = 0, tokens; i < m; i += tokens) {
        // Tiles of three; four are two and two.
        tokens = min_of(Ops::kTokens == 3 && m - i == 4 ? 2 : Ops::kTokens, m - i);
        float* sum = sums + i * kRows * Ops::kAccFloats;
        if (tokens == 3) {
          if constexpr (Ops::kTokens >= 3) {
            mac_decoded<Ops, 3>(decoded, count, x + i, first * kBlock, scale, sum);
          }
        } else if (tokens == 2) {
          mac_decoded<Ops, 2>(decoded, count, x + i, first * kBlock, scale, sum);
        } else {
          mac_decoded<Ops, 1>(decoded, count, x + i, first * kBlock, scale, sum);
        }
      }
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        y[i * ldy + (n - n_begin) + r] =
            group.finish(static_cast<int>(r),
                         Ops::reduce(Ops::load_acc(sums + (i * kRows + r) * Ops::kAccFloats)));
      }
    }
    if (Ops::any_nan(flag)) patch_nan<Ops>(group, rows, m, y + (n - n_begin), ldy);
  }
}

// The few-row form for the m <= M activation rows there are.
template <class Ops, bool OneStream, int M>
void matmul_few_of(const WeightView& w, int64_t n_begin, int64_t n_end,
                   const typename Ops::Elem* const* rows, int64_t m, float* y, int64_t ldy) {
  if constexpr (M > 1) {
    if (m < M) return matmul_few_of<Ops, OneStream, M - 1>(w, n_begin, n_end, rows, m, y, ldy);
  }
  const typename Ops::Elem* x[M];
  for (int i = 0; i < M; ++i) x[i] = rows[i];
  constexpr int kRows = OneStream ? Ops::one_stream_rows(M) : Ops::kFewRows;
  matmul_few<Fetched<Ops, kRows, OneStream>, M>(w, n_begin, n_end, x, y, ldy);
}

template <class Ops, bool OneStream>
void matmul(const WeightView& w, int64_t n_begin, int64_t n_end, const void* x,
            const int32_t* row_ids, int64_t m, float* y, int64_t ldy) noexcept {
  using Elem = typename Ops::Elem;
  constexpr int kMaxFew = OneStream ? Ops::kMaxFewOneStream : Ops::kMaxFew;
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
    if (count <= kMaxFew) {
      matmul_few_of<Ops, OneStream, kMaxFew>(w, n_begin, n_end, rows, count, out, ldy);
    } else {
      matmul_many<Fetched<Ops, Ops::kRows, OneStream>>(w, n_begin, n_end, rows, count, out, ldy);
    }
  }
}

template <class Ops>
MatmulKernel rows_kernel(const isa_tables::Traits& traits, const char* name, Isa isa) {
  return {name,
          isa,
          spread_row_bytes<typename Ops::Elem>,
          prepare<Ops>,
          nullptr,
          nullptr,
          traits.one_stream ? matmul<Ops, true> : matmul<Ops, false>};
}

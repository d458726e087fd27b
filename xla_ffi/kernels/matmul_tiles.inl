// y = x Wᵀ on 16x16 tiles of BF16 dot products: weights are the A operand (16 rows x 32 columns,
// expanded to BF16 block by block), activations the B operand (packed once a panel), sums are FP32.
// Included inside an anonymous namespace after matmul_common.inl; AMX supplies `Ops` in
// matmul_amx.cc, a test supplies emulated tiles.
//
// clang-format off
//   kWeightBits, column(i)        as in matmul_rows.inl; Elem is BF16 bits
//   Unscaled, RowScaled or GroupScaled   as a base
//   kFolded                       group scales are multiplied into the expanded weights, exactly
//   kTerms                        BF16 numbers whose sum a weight is: 1, or 2 where one is too short
//   kBlockCols                    columns expanded at a time: a multiple of 128 (128 if sums are scaled by group)
//   kAheadBytes                   prefetch distance along a row
//   expand(src, scales, dst0, dst1)   64 stored weights of one row, and their scales by group, to
//                                 2 x 32 BF16; a second term behind the tile of the first
//   fits(scales), value(row, col), kPadScale   if folded: whether those scales give what BF16 can hold; a
//                                 code's value; byte of the scales of columns past the end
//   flush(sum, part, scale)       sum[16] += part[16] * scale, one FMA each
//   scale_row(sum, scale)         sum[16] *= scale
//   transpose(src, stride, dst)   16x16 words, `stride` words between source rows
//   Tiles::zero<T>, load<T>, store<T>, dot<C, A, B>
// clang-format on
//
// Order of additions of one output: blocks of 128 columns ascending, tile steps of 32 columns
// ascending, their terms, the hardware's own order within one. Row and column tiling never enters.
// Rows with a scale that does not fit (2^-100 and the like) are computed by themselves, each token
// alike.

constexpr int kTile = 16;
constexpr int kStepCols = 32;
constexpr int kTileWords = kTile * kTile;
constexpr int64_t kGroupRows = 64;  // weight rows that share one pass over the panel
// Sums of one group and chunk take 64 KiB of second-level cache; weights are expanded once a chunk.
constexpr int64_t kChunkTokens = 256;

// Column of a block at position i of nibbles expanded 64 at a time: of 16-bit words with four, the
// first vector holds the first of sixteen words, then the second; the other the third and fourth.
constexpr int nibble_tile_column(int i) {
  return i / 64 * 64 + i % 16 * 4 + i % 64 / 32 * 2 + i % 32 / 16;
}

inline float nibble_value(const uint8_t* row, int64_t col, uint32_t (*bits)(uint32_t)) {
  return __builtin_bit_cast(float, bits(row[col / 2] >> col % 2 * 4 & 15u));
}

// What folded scales must be for weights that are ordinary BF16 numbers: far within its range.
inline bool bf16_scale_fits(const uint8_t* at) {
  uint16_t bits;
  __builtin_memcpy(&bits, at, 2);
  const int exponent = bits >> 7 & 255;
  return (bits & 0x7FFF) == 0 || (exponent >= 27 && exponent <= 227);  // 2^-100 to 2^100
}
inline bool f32_scale_fits(const uint8_t* at) {
  const int exponent = load_word(at) >> 23 & 255;
  return exponent == 0 ? load_f32_of_word(at) == 0 : exponent >= 27 && exponent <= 227;
}
inline bool e8m0_scale_fits(uint8_t code) { return code >= 20 && code <= 235; }

template <class Ops>
size_t tiles_panel_bytes(int64_t m, int64_t k) {
  const int64_t steps = ceil_div(k, kBlock) * kBlock / kStepCols;
  return static_cast<size_t>(ceil_div(m, kTile) * steps * kTileWords) * sizeof(uint32_t);
}

// Panel: [tile of 16 rows][step of 32 columns][pair of columns][row], a pair of BF16 a word.
template <class Ops>
void tiles_make_panel(const void* prepared, int64_t k, const int32_t* row_ids, int64_t m,
                      void* panel) noexcept {
  const size_t row_bytes = spread_row_bytes<uint16_t>(k);
  const int64_t steps = ceil_div(k, kBlock) * kBlock / kStepCols;
  uint32_t* out = static_cast<uint32_t*>(panel);
  for (int64_t begin = 0; begin < m; begin += kTile) {
    const int64_t rows = min_of(kTile, m - begin);
    const char* row[kTile];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t id = row_ids == nullptr ? begin + i : row_ids[begin + i];
      row[i] = static_cast<const char*>(prepared) + id * row_bytes;
    }
    alignas(64) uint32_t gathered[kTileWords] = {};
    for (int64_t step = 0; step < steps; ++step, out += kTileWords) {
      for (int64_t i = 0; i < rows; ++i) {
        __builtin_memcpy(gathered + i * kTile, row[i] + step * kStepCols * 2, kStepCols * 2);
      }
      Ops::transpose(gathered, kTile, out);
    }
  }
}

// kGroupRows weight rows (the last repeated past the range's end) and their expanded block.
template <class Ops>
struct TileGroup {
  static constexpr int64_t kSteps = Ops::kBlockCols / kStepCols;

  const WeightView& w;
  int64_t n_begin;
  int64_t n_last;
  int64_t next_group_bytes;
  // [row tile][step][term][row][column]
  alignas(64) uint16_t block[kGroupRows * Ops::kBlockCols * Ops::kTerms];
  float scale[kGroupRows];
  uint64_t unfit = 0;  // rows that have a scale that does not fit

  TileGroup(const WeightView& w, int64_t n_begin, int64_t n_end, int64_t group_rows)
      : w(w),
        n_begin(n_begin),
        n_last(n_end - 1),
        next_group_bytes(group_rows * w.row_stride_bytes - w.k * Ops::kWeightBits / 8) {}

  // Expands columns [col, col + steps * 32) of `rows` rows.
  void expand(int64_t col, int64_t steps, int64_t rows) {
    constexpr int64_t kStepElems = kTileWords * 2 * Ops::kTerms;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = min_of(n_begin + r, n_last);
      const uint8_t* row = w.data + n * w.row_stride_bytes;
      const uint8_t* scales = nullptr;
      if constexpr (Ops::kGroupScaled) {
        scales = w.scale +
                 (n / Ops::kScaleRows * w.scale_stride + col / Ops::kGroupCols) * Ops::kScaleBytes;
        if constexpr (!Ops::kFolded) scale[r] = load_group_scale<Ops>(scales);
      }
      uint16_t* out = block + r / kTile * kSteps * kStepElems + r % kTile * kStepCols;
      for (int64_t step = 0; step < steps; step += 2) {
        const int64_t at = col + step * kStepCols;
        uint8_t padded_scales[2 * 4];
        if constexpr (Ops::kFolded) {
          // The groups of 64 columns at a time, of which some, or all, may lie past the row's end.
          constexpr int64_t kBytes = Ops::kScaleBytes, kGroups = 2 * kStepCols / Ops::kGroupCols;
          static_assert(kGroups * kBytes <= static_cast<int64_t>(sizeof(padded_scales)));
          const uint8_t* piece_scales = scales + step * kStepCols / Ops::kGroupCols * kBytes;
          const int64_t left = ceil_div(w.k - at, Ops::kGroupCols);
          if (left < kGroups) {
            for (uint8_t& byte : padded_scales) byte = Ops::kPadScale;
            if (left > 0) __builtin_memcpy(padded_scales, piece_scales, left * kBytes);
            piece_scales = padded_scales;
          }
          if (!Ops::fits(piece_scales)) unfit |= uint64_t{1} << r;
          expand_piece(row, piece_scales, at, out + step * kStepElems, kStepElems);
        } else {
          expand_piece(row, scales, at, out + step * kStepElems, kStepElems);
        }
      }
    }
  }

  void expand_piece(const uint8_t* row, const uint8_t* scales, int64_t col, uint16_t* out,
                    int64_t step_elems) {
    constexpr int64_t kPieceBytes = 2 * kStepCols * Ops::kWeightBits / 8;
    const int64_t offset = col * Ops::kWeightBits / 8;
    int64_t ahead = offset + Ops::kAheadBytes;
    if (ahead >= w.k * Ops::kWeightBits / 8) ahead += next_group_bytes;
    for (int64_t line = 0; line < kPieceBytes; line += 64) {
      __builtin_prefetch(row + ahead + line, 0, 3);
    }
    if (col + 2 * kStepCols <= w.k) {
      Ops::expand(row + offset, scales, out, out + step_elems);
      return;
    }
    alignas(64) uint8_t padded[kPieceBytes] = {};
    if (col < w.k) __builtin_memcpy(padded, row + offset, (w.k - col) * Ops::kWeightBits / 8);
    Ops::expand(padded, scales, out, out + step_elems);
  }

  const uint16_t* tile(int64_t row_tile, int64_t step, int term) const {
    return block + ((row_tile * kSteps + step) * Ops::kTerms + term) * kTileWords * 2;
  }
};

// R x C tiles of sums (tiles 0-3, A in 4-5, B in 6-7) over one expanded block. `sums` holds tiles
// [row tile][column tile] with `sums_stride` floats between row tiles.
template <class Ops, int R, int C>
inline void tiles_block(const TileGroup<Ops>& group, int64_t row_tile, int64_t steps,
                        const uint32_t* panel, int64_t panel_stride, float* sums,
                        int64_t sums_stride) {
  using Tiles = typename Ops::Tiles;
  constexpr int64_t kRowBytes = 64;
  constexpr bool kScaleSums = Ops::kGroupScaled && !Ops::kFolded;
  if constexpr (kScaleSums) {
    Tiles::template zero<0>();
    if constexpr (C == 2) Tiles::template zero<1>();
    if constexpr (R == 2) Tiles::template zero<2>();
    if constexpr (R == 2 && C == 2) Tiles::template zero<3>();
  } else {
    Tiles::template load<0>(sums, kRowBytes);
    if constexpr (C == 2) Tiles::template load<1>(sums + kTileWords, kRowBytes);
    if constexpr (R == 2) Tiles::template load<2>(sums + sums_stride, kRowBytes);
    if constexpr (R == 2 && C == 2) {
      Tiles::template load<3>(sums + sums_stride + kTileWords, kRowBytes);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    Tiles::template load<6>(panel + step * kTileWords, kRowBytes);
    if constexpr (C == 2) {
      Tiles::template load<7>(panel + panel_stride + step * kTileWords, kRowBytes);
    }
    for (int term = 0; term < Ops::kTerms; ++term) {
      Tiles::template load<4>(group.tile(row_tile, step, term), kRowBytes);
      Tiles::template dot<0, 4, 6>();
      if constexpr (C == 2) Tiles::template dot<1, 4, 7>();
      if constexpr (R == 2) {
        Tiles::template load<5>(group.tile(row_tile + 1, step, term), kRowBytes);
        Tiles::template dot<2, 5, 6>();
        if constexpr (C == 2) Tiles::template dot<3, 5, 7>();
      }
    }
  }
  alignas(64) float part[R * C][kTileWords];
  float* out[R * C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float* sum = sums + r * sums_stride + c * kTileWords;
      out[r * C + c] = kScaleSums ? part[r * C + c] : sum;
    }
  }
  Tiles::template store<0>(out[0], kRowBytes);
  if constexpr (C == 2) Tiles::template store<1>(out[1], kRowBytes);
  if constexpr (R == 2) Tiles::template store<2>(out[C], kRowBytes);
  if constexpr (R == 2 && C == 2) Tiles::template store<3>(out[3], kRowBytes);
  if constexpr (kScaleSums) {
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) {
        float* sum = sums + r * sums_stride + c * kTileWords;
        for (int i = 0; i < kTile; ++i) {
          Ops::flush(sum + i * kTile, part[r * C + c] + i * kTile,
                     group.scale[(row_tile + r) * kTile + i]);
        }
      }
    }
  }
}

// One group of weight rows against one chunk of the panel.
template <class Ops>
void tiles_group(TileGroup<Ops>& group, int64_t rows, int64_t tokens, const uint32_t* panel,
                 int64_t k, float* sums) {
  const int64_t total_steps = ceil_div(k, kBlock) * kBlock / kStepCols;
  const int64_t panel_stride = total_steps * kTileWords;
  const int64_t row_tiles = ceil_div(rows, kTile);
  const int64_t token_tiles = ceil_div(tokens, kTile);
  const int64_t sums_stride = token_tiles * kTileWords;
  __builtin_memset(sums, 0, static_cast<size_t>(row_tiles * sums_stride) * sizeof(float));
  for (int64_t step = 0; step < total_steps; step += group.kSteps) {
    const int64_t steps = min_of(group.kSteps, total_steps - step);
    group.expand(step * kStepCols, steps, row_tiles * kTile);
    for (int64_t t = 0; t < token_tiles; t += 2) {
      const uint32_t* b = panel + t * panel_stride + step * kTileWords;
      for (int64_t r = 0; r < row_tiles; r += 2) {
        float* sum = sums + r * sums_stride + t * kTileWords;
        const bool two_rows = r + 1 < row_tiles;
        if (t + 1 < token_tiles) {
          (two_rows ? tiles_block<Ops, 2, 2>
                    : tiles_block<Ops, 1, 2>)(group, r, steps, b, panel_stride, sum, sums_stride);
        } else {
          (two_rows ? tiles_block<Ops, 2, 1>
                    : tiles_block<Ops, 1, 1>)(group, r, steps, b, panel_stride, sum, sums_stride);
        }
      }
    }
  }
}

// Row n of the weights, whose scales do not fit, for the tokens of a panel.
template <class Ops>
__attribute__((noinline, cold)) void tiles_row(const WeightView& w, int64_t n,
                                               const uint32_t* panel, int64_t tokens, float* y,
                                               int64_t ldy) {
  constexpr int64_t kGroups = kBlock / Ops::kGroupCols;
  const uint8_t* row = w.data + n * w.row_stride_bytes;
  const uint8_t* scales = w.scale + n * w.scale_stride * Ops::kScaleBytes;
  const int64_t steps = ceil_div(w.k, kBlock) * kBlock / kStepCols;
  for (int64_t i = 0; i < tokens; ++i) {
    const uint32_t* tile = panel + i / kTile * steps * kTileWords + i % kTile;
    float sum = 0;
    for (int64_t begin = 0; begin < w.k; begin += kBlock) {
      float part[kGroups] = {};
      for (int p = 0; p < kBlock; ++p) {
        const int column = Ops::column(p);
        if (begin + column >= w.k) continue;
        const uint32_t pair = tile[(begin + p) / 2 * kTile];
        const float x = __builtin_bit_cast(float, p % 2 == 0 ? pair << 16 : pair & 0xFFFF0000u);
        float value = Ops::value(row, begin + column);
        if constexpr (Ops::kZeros) {
          const int64_t at = (begin + column) / Ops::kGroupCols;
          value -= static_cast<float>(load_zero(scales + at * Ops::kScaleBytes));
        }
        part[column / Ops::kGroupCols] += value * x;
      }
      for (int64_t g = 0; g < kGroups && begin + g * Ops::kGroupCols < w.k; ++g) {
        const int64_t at = begin / Ops::kGroupCols + g;
        sum += part[g] * load_group_scale<Ops>(scales + at * Ops::kScaleBytes);
      }
    }
    if constexpr (Ops::kRowTail) sum *= load_row_tail(w, n);
    y[i * ldy] = sum;
  }
}

template <class Ops>
void tiles_matmul(const WeightView& w, int64_t n_begin, int64_t n_end, const void* x,
                  const int32_t*, int64_t m, float* y, int64_t ldy) noexcept {
  const FloatMode mode;
  const uint32_t* panel = static_cast<const uint32_t*>(x);
  const int64_t panel_stride = ceil_div(w.k, kBlock) * kBlock / kStepCols * kTileWords;
  alignas(64) float sums[kGroupRows * kChunkTokens];
  // Wide groups save passes over the panel; where it is one tile, narrow ones keep fewer streams
  // open.
  const int64_t group_rows = m <= kTile ? kGroupRows / 2 : kGroupRows;
  for (int64_t n = n_begin; n < n_end; n += group_rows) {
    const int64_t rows = min_of(group_rows, n_end - n);
    TileGroup<Ops> group(w, n, n_end, group_rows);
    for (int64_t begin = 0; begin < m; begin += kChunkTokens) {
      const int64_t tokens = min_of(kChunkTokens, m - begin);
      tiles_group<Ops>(group, rows, tokens, panel + begin / kTile * panel_stride, w.k, sums);
      const int64_t sums_stride = ceil_div(tokens, kTile) * kTileWords;
      if constexpr (Ops::kRowScaled || Ops::kRowTail) {
        for (int64_t r = 0; r < rows; ++r) {
          float scale;
          if constexpr (Ops::kRowTail) {
            scale = load_row_tail(w, n + r);
          } else {
            scale = load_f32(w.scale + (n + r) * w.scale_stride * 4);
          }
          float* sum = sums + r / kTile * sums_stride + r % kTile * kTile;
          for (int64_t t = 0; t < tokens; t += kTile) Ops::scale_row(sum + t * kTile, scale);
        }
      }
      for (int64_t r = 0; r < rows; r += kTile) {
        const size_t row_bytes = static_cast<size_t>(min_of(kTile, rows - r)) * sizeof(float);
        for (int64_t t = 0; t < tokens; t += kTile) {
          alignas(64) uint32_t by_token[kTileWords];
          const float* tile = sums + r / kTile * sums_stride + t / kTile * kTileWords;
          Ops::transpose(reinterpret_cast<const uint32_t*>(tile), kTile, by_token);
          for (int64_t i = 0; i < min_of(kTile, tokens - t); ++i) {
            __builtin_memcpy(y + (begin + t + i) * ldy + (n - n_begin) + r, by_token + i * kTile,
                             row_bytes);
          }
        }
      }
      if constexpr (Ops::kFolded) {
        for (int64_t r = 0; group.unfit != 0 && r < rows; ++r) {
          if ((group.unfit >> r & 1) == 0) continue;
          tiles_row<Ops>(w, n + r, panel + begin / kTile * panel_stride, tokens,
                         y + begin * ldy + (n - n_begin) + r, ldy);
        }
      }
    }
  }
}

template <class Ops>
MatmulKernel tiles_kernel(const char* name, Isa isa) {
  return {name,
          isa,
          spread_row_bytes<uint16_t>,
          prepare<Ops>,
          tiles_panel_bytes<Ops>,
          tiles_make_panel<Ops>,
          tiles_matmul<Ops>};
}

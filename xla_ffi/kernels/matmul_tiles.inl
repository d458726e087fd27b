// y = x Wᵀ on 16x16 tiles of BF16 dot products: weights are the A operand (16 rows x 32 columns,
// expanded to BF16 block by block), activations the B operand (packed once a panel), sums are FP32.
// Included inside an anonymous namespace after matmul_common.inl; AMX supplies `Ops` in
// matmul_amx.cc, a test supplies emulated tiles.
//
// clang-format off
//   kWeightBits, column(i), Unscaled or BlockScaled   as in matmul_rows.inl; Elem is BF16 bits
//   kBlockCols                         columns expanded at a time: a multiple of 128 (128 if scaled)
//   kAheadBytes                        prefetch distance along a row
//   expand(src, dst0, dst1)            64 stored weights of one row to 2 x 32 BF16
//   flush(sum, part, scale)            sum[16] += part[16] * scale, one FMA each
//   transpose(src, stride, dst)        16x16 words, `stride` words between source rows
//   Tiles::zero<T>, load<T>, store<T>, dot<C, A, B>
// clang-format on
//
// Order of additions of one output: blocks of 128 columns ascending, tile steps of 32 columns
// ascending, the hardware's own order within a step. Row and column tiling never enters.

constexpr int kTile = 16;
constexpr int kStepCols = 32;
constexpr int kTileWords = kTile * kTile;
constexpr int64_t kGroupRows = 64;  // weight rows that share one pass over the panel
// Sums of one group and chunk take 64 KiB of second-level cache; weights are expanded once a chunk.
constexpr int64_t kChunkTokens = 256;

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
  alignas(64) uint16_t block[kGroupRows * Ops::kBlockCols];  // [row tile][step][row][column]
  float scale[kGroupRows];

  TileGroup(const WeightView& w, int64_t n_begin, int64_t n_end, int64_t group_rows)
      : w(w),
        n_begin(n_begin),
        n_last(n_end - 1),
        next_group_bytes(group_rows * w.row_stride_bytes - w.k * Ops::kWeightBits / 8) {}

  // Expands columns [col, col + steps * 32) of `rows` rows.
  void expand(int64_t col, int64_t steps, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = min_of(n_begin + r, n_last);
      const uint8_t* row = w.data + n * w.row_stride_bytes;
      if constexpr (Ops::kGroupScaled) {
        scale[r] = load_f32(w.scale + (n / kScaleBlock * w.scale_stride + col / kScaleBlock) * 4);
      }
      uint16_t* out = block + r / kTile * kSteps * kTileWords * 2 + r % kTile * kStepCols;
      for (int64_t step = 0; step < steps; step += 2) {
        expand_piece(row, col + step * kStepCols, out + step * kTileWords * 2);
      }
    }
  }

  void expand_piece(const uint8_t* row, int64_t col, uint16_t* out) {
    constexpr int64_t kPieceBytes = 2 * kStepCols * Ops::kWeightBits / 8;
    const int64_t offset = col * Ops::kWeightBits / 8;
    int64_t ahead = offset + Ops::kAheadBytes;
    if (ahead >= w.k * Ops::kWeightBits / 8) ahead += next_group_bytes;
    for (int64_t line = 0; line < kPieceBytes; line += 64) {
      __builtin_prefetch(row + ahead + line, 0, 3);
    }
    if (col + 2 * kStepCols <= w.k) {
      Ops::expand(row + offset, out, out + kTileWords * 2);
      return;
    }
    alignas(64) uint8_t padded[kPieceBytes] = {};
    if (col < w.k) __builtin_memcpy(padded, row + offset, (w.k - col) * Ops::kWeightBits / 8);
    Ops::expand(padded, out, out + kTileWords * 2);
  }

  const uint16_t* tile(int64_t row_tile, int64_t step) const {
    return block + (row_tile * kSteps + step) * kTileWords * 2;
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
  if constexpr (Ops::kGroupScaled) {
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
    Tiles::template load<4>(group.tile(row_tile, step), kRowBytes);
    Tiles::template load<6>(panel + step * kTileWords, kRowBytes);
    Tiles::template dot<0, 4, 6>();
    if constexpr (C == 2) {
      Tiles::template load<7>(panel + panel_stride + step * kTileWords, kRowBytes);
      Tiles::template dot<1, 4, 7>();
    }
    if constexpr (R == 2) {
      Tiles::template load<5>(group.tile(row_tile + 1, step), kRowBytes);
      Tiles::template dot<2, 5, 6>();
      if constexpr (C == 2) Tiles::template dot<3, 5, 7>();
    }
  }
  alignas(64) float part[R * C][kTileWords];
  float* out[R * C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float* sum = sums + r * sums_stride + c * kTileWords;
      out[r * C + c] = Ops::kGroupScaled ? part[r * C + c] : sum;
    }
  }
  Tiles::template store<0>(out[0], kRowBytes);
  if constexpr (C == 2) Tiles::template store<1>(out[1], kRowBytes);
  if constexpr (R == 2) Tiles::template store<2>(out[C], kRowBytes);
  if constexpr (R == 2 && C == 2) Tiles::template store<3>(out[3], kRowBytes);
  if constexpr (Ops::kGroupScaled) {
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

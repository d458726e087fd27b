// What every kernel of every instruction set shares: float mode, conversions, prepared rows.
// Included inside an anonymous namespace, after format_bits.inl (see isa_tables.h).

constexpr int64_t kBlock = 128;

// Decoding is exact only where the hardware keeps subnormals; a caller's thread may flush them, a
// worker's may not. Both compute alike under this.
class FloatMode {
 public:
  FloatMode() : saved_(_mm_getcsr()) {
    if ((saved_ & ~0x3Fu) != kDefault) _mm_setcsr(kDefault);
  }
  ~FloatMode() {
    if ((saved_ & ~0x3Fu) != kDefault) _mm_setcsr(saved_);
  }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  static constexpr unsigned kDefault = 0x1F80;
  unsigned saved_;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

inline void to_elem(float value, float* out) { *out = value; }
inline void to_elem(uint16_t bits, float* out) {
  *out = __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}
inline void to_elem(float value, uint16_t* out) {
  *out = bf16_round_bits(__builtin_bit_cast(uint32_t, value));
}
inline void to_elem(uint16_t bits, uint16_t* out) { *out = bits; }

// Rows start 512 bytes apart modulo 4 KiB, so that one block of many rows spreads over all sets of
// a first-level cache instead of meeting in a few (k of real models is a multiple of 1024).
template <class Elem>
size_t spread_row_bytes(int64_t k) {
  const int64_t bytes = ceil_div(k, kBlock) * kBlock * static_cast<int64_t>(sizeof(Elem));
  const int64_t rest = (bytes + 4096 - 512) % 4096;
  return static_cast<size_t>(rest == 0 ? bytes : bytes + 4096 - rest);
}

// How the weights of a format are scaled: what its decoder's class says by inheriting from one.
struct Unscaled {
  static constexpr bool kRowScaled = false;    // one FP32 factor for the sum of a row
  static constexpr bool kGroupScaled = false;  // one for the sum of every kGroupCols columns
  static constexpr bool kRowTail = false;      // and one for the row, behind those of its groups
  static constexpr bool kZeros = false;        // a group's zero point is taken from its weights
  static constexpr bool kFlushes = false;      // sums of a part of a row are added to the row's
};
struct RowScaled {
  static constexpr bool kRowScaled = true;
  static constexpr bool kGroupScaled = false;
  static constexpr bool kRowTail = false;
  static constexpr bool kZeros = false;
  static constexpr bool kFlushes = true;
};

inline uint32_t load_word(const uint8_t* at) {
  uint32_t word;
  __builtin_memcpy(&word, at, 4);
  return word;
}
inline float load_f32(const uint8_t* at) { return __builtin_bit_cast(float, load_word(at)); }
inline float load_bf16(const uint8_t* at) {
  uint16_t bits;
  __builtin_memcpy(&bits, at, 2);
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}
inline float load_e8m0(const uint8_t* at) { return __builtin_bit_cast(float, e8m0_bits(*at)); }
inline float load_e4m3(const uint8_t* at) { return __builtin_bit_cast(float, fp8_e4m3_bits(*at)); }
inline float load_f32_of_word(const uint8_t* at) {
  return __builtin_bit_cast(float, scale_of_word(load_word(at)));
}
inline int load_zero(const uint8_t* at) { return zero_of_word(load_word(at)); }

// kScaleRows rows and kGroupCols columns share a scale of kScaleBytes.
template <int64_t kRows, int kCols, int kBytes, float (*kLoad)(const uint8_t*)>
struct GroupScaled {
  static constexpr bool kRowScaled = false;
  static constexpr bool kGroupScaled = true;
  static constexpr bool kRowTail = false;
  static constexpr bool kZeros = false;
  static constexpr bool kFlushes = true;
  static constexpr int64_t kScaleRows = kRows;
  static constexpr int kGroupCols = kCols;
  static constexpr int kScaleBytes = kBytes;
  static constexpr int kBlockScaleBytes = kBlock / kCols * kBytes;
  static float load_one(const uint8_t* at) { return kLoad(at); }
};
using BlockScaled = GroupScaled<kScaleBlock, kScaleBlock, 4, load_f32>;
using Int4G32Scaled = GroupScaled<1, 32, 2, load_bf16>;
using Int4G128Scaled = GroupScaled<1, 128, 2, load_bf16>;
using MxScaled = GroupScaled<1, 32, 1, load_e8m0>;
template <int kCols>
struct Uint4Scaled : GroupScaled<1, kCols, 4, load_f32_of_word> {
  static constexpr bool kZeros = true;
};
struct Nvfp4Scaled : GroupScaled<1, 16, 1, load_e4m3> {
  static constexpr bool kRowTail = true;
};

// The factor of row n, where it lies behind the scales of its groups.
inline float load_row_tail(const WeightView& w, int64_t n) {
  return load_f32(w.scale + (n + 1) * w.scale_stride - 4);
}

// One scale of a group-scaled format.
template <class Scaling>
inline float load_group_scale(const uint8_t* at) {
  return Scaling::load_one(at);
}

template <class Ops, class Source>
void prepare_row(const Source* x, int64_t k, typename Ops::Elem* out) {
  int64_t begin = 0;
  for (; begin + kBlock <= k; begin += kBlock) {
    for (int i = 0; i < kBlock; ++i) to_elem(x[begin + Ops::column(i)], out + begin + i);
  }
  if (begin == k) return;
  Source padded[kBlock] = {};
  __builtin_memcpy(padded, x + begin, static_cast<size_t>(k - begin) * sizeof(Source));
  for (int i = 0; i < kBlock; ++i) to_elem(padded[Ops::column(i)], out + begin + i);
}

template <class Ops>
void prepare(ActivationType type, const void* x, int64_t ldx, int64_t k, int64_t row_begin,
             int64_t row_end, void* prepared) noexcept {
  using Elem = typename Ops::Elem;
  const size_t row_bytes = spread_row_bytes<Elem>(k);
  for (int64_t row = row_begin; row < row_end; ++row) {
    Elem* out = reinterpret_cast<Elem*>(static_cast<char*>(prepared) + row * row_bytes);
    if (type == ActivationType::kF32) {
      prepare_row<Ops>(static_cast<const float*>(x) + row * ldx, k, out);
    } else {
      prepare_row<Ops>(static_cast<const uint16_t*>(x) + row * ldx, k, out);
    }
  }
}

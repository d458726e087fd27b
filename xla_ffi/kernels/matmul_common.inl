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
  static constexpr bool kFlushes = false;      // sums of a part of a row are added to the row's
};
struct RowScaled {
  static constexpr bool kRowScaled = true;
  static constexpr bool kGroupScaled = false;
  static constexpr bool kFlushes = true;
};
// kScaleRows rows and kGroupCols columns share a scale of kScaleBytes.
template <int64_t kRows, int kCols, int kBytes>
struct GroupScaled {
  static constexpr bool kRowScaled = false;
  static constexpr bool kGroupScaled = true;
  static constexpr bool kFlushes = true;
  static constexpr int64_t kScaleRows = kRows;
  static constexpr int kGroupCols = kCols;
  static constexpr int kScaleBytes = kBytes;
  static constexpr int kBlockScaleBytes = kBlock / kCols * kBytes;
};
using BlockScaled = GroupScaled<kScaleBlock, kScaleBlock, 4>;
using Int4G32Scaled = GroupScaled<1, 32, 2>;
using Int4G128Scaled = GroupScaled<1, 128, 2>;
using MxScaled = GroupScaled<1, 32, 1>;

inline float load_f32(const uint8_t* at) {
  float value;
  __builtin_memcpy(&value, at, 4);
  return value;
}
inline float load_bf16(const uint8_t* at) {
  uint16_t bits;
  __builtin_memcpy(&bits, at, 2);
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}
inline float load_e8m0(const uint8_t* at) { return __builtin_bit_cast(float, e8m0_bits(*at)); }

// One scale of a group-scaled format.
template <class Scaling>
inline float load_group_scale(const uint8_t* at) {
  if constexpr (Scaling::kScaleBytes == 4) return load_f32(at);
  if constexpr (Scaling::kScaleBytes == 2) return load_bf16(at);
  if constexpr (Scaling::kScaleBytes == 1) return load_e8m0(at);
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

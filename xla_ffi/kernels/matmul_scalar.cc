// Baseline form: plain C++ over eight independent lanes, no instruction beyond x86-64's own. It is
// the form the others are checked against on any machine, and the one that runs where there is no
// AVX2.
#include <xmmintrin.h>

#include "kernels/isa_tables.h"

namespace jaxmoe {
namespace {

#include "kernels/fp8_e4m3.inl"
#include "kernels/matmul_common.inl"
#include "kernels/matmul_rows.inl"

// Eight lanes as two of the vectors every x86-64 has.
typedef float Float4 __attribute__((vector_size(16)));
struct Lanes {
  static constexpr int kCount = 8;
  Float4 v[2];
};

struct Fp8Values {
  float v[256];
  constexpr Fp8Values() : v() {
    for (uint32_t code = 0; code < 256; ++code)
      v[code] = __builtin_bit_cast(float, fp8_e4m3_bits(code));
  }
};
constexpr Fp8Values kFp8Values;

template <WeightFormat kFormat>
struct Scalar {
  using Elem = float;
  using Acc = Lanes;
  using Weights = Lanes;
  struct Flag {};
  static constexpr int kElems = Lanes::kCount;
  static constexpr int kAccFloats = Lanes::kCount;
  static constexpr int kGroupVecs = 1;
  static constexpr int kWeightBytes =
      kFormat == WeightFormat::kF32 ? 4 : (kFormat == WeightFormat::kBf16 ? 2 : 1);
  // A tile of sums is six of the sixteen registers, two to a sum.
  static constexpr int kRows = 1;
  static constexpr int kTokens = 3;
  static constexpr int64_t kTokenChunk = 24;
  static constexpr int64_t kChunkBlocks = 4;
  static constexpr int kFewRows = 2;
  static constexpr int kMaxFew = 2;
  static constexpr int one_stream_rows(int) { return 2; }
  static constexpr int kMaxFewOneStream = 2;
  static constexpr bool kScaled = kFormat == WeightFormat::kFp8Block;
  static constexpr float kScaleFold = 1.0f;

  static constexpr int column(int i) { return i; }
  static Lanes zero() { return {}; }
  static Lanes load(const float* p) {
    Lanes out;
    __builtin_memcpy(&out, p, sizeof(out));
    return out;
  }
  static void store_weights(float* p, const Lanes& a) { __builtin_memcpy(p, &a, sizeof(a)); }
  static Lanes load_acc(const float* p) { return load(p); }
  static void store_acc(float* p, const Lanes& a) { store_weights(p, a); }
  static void decode(const uint8_t* src, Lanes (&out)[1], Flag&) {
    float value[kElems];
    for (int i = 0; i < kElems; ++i) {
      if constexpr (kFormat == WeightFormat::kFp8Block) {
        value[i] = kFp8Values.v[src[i]];
      } else if constexpr (kFormat == WeightFormat::kBf16) {
        uint16_t bits;
        __builtin_memcpy(&bits, src + 2 * i, 2);
        to_elem(bits, &value[i]);
      } else {
        __builtin_memcpy(&value[i], src + 4 * i, 4);
      }
    }
    out[0] = load(value);
  }
  static Lanes mac(const Lanes& sum, const Lanes& a, const Lanes& b) {
    return {{sum.v[0] + a.v[0] * b.v[0], sum.v[1] + a.v[1] * b.v[1]}};
  }
  static Lanes flush(const Lanes& sum, const Lanes& part, float scale) {
    return {{sum.v[0] + part.v[0] * scale, sum.v[1] + part.v[1] * scale}};
  }
  static float reduce(const Lanes& a) {
    const Float4 four = a.v[0] + a.v[1];
    return (four[0] + four[1]) + (four[2] + four[3]);
  }
  static bool any_nan(const Flag&) { return false; }
};

}  // namespace

namespace isa_tables {

void fill_scalar(KernelTable& table, const Traits& traits) {
  for (MatmulKernel(&family)[kNumFormats] : table.matmul) {
    family[static_cast<int>(WeightFormat::kF32)] =
        rows_kernel<Scalar<WeightFormat::kF32>>(traits, "matmul_f32_f32_scalar", Isa::kScalar);
    family[static_cast<int>(WeightFormat::kBf16)] =
        rows_kernel<Scalar<WeightFormat::kBf16>>(traits, "matmul_bf16_f32_scalar", Isa::kScalar);
    family[static_cast<int>(WeightFormat::kFp8Block)] =
        rows_kernel<Scalar<WeightFormat::kFp8Block>>(traits, "matmul_fp8block_f32_scalar",
                                                     Isa::kScalar);
  }
}

}  // namespace isa_tables
}  // namespace jaxmoe

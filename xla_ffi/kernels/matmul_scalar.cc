// Baseline form: plain C++ over eight independent lanes, no instruction beyond x86-64's own. It is
// the form the others are checked against on any machine, and the one that runs where there is no
// AVX2.
#include <xmmintrin.h>

#include "kernels/isa_tables.h"

namespace jaxmoe {
namespace {

#include "kernels/format_bits.inl"
#include "kernels/matmul_common.inl"
#include "kernels/matmul_rows.inl"

// Eight lanes as two of the vectors every x86-64 has.
typedef float Float4 __attribute__((vector_size(16)));
struct Lanes {
  static constexpr int kCount = 8;
  Float4 v[2];
};

// Every value of a format of small codes.
template <int kCodes, uint32_t (*kBits)(uint32_t)>
struct Values {
  float v[kCodes];
  constexpr Values() : v() {
    for (uint32_t code = 0; code < kCodes; ++code) {
      v[code] = __builtin_bit_cast(float, kBits(code));
    }
  }
};
constexpr Values<256, fp8_e4m3_bits> kFp8Values;
constexpr Values<16, fp4_e2m1_bits> kFp4Values;
constexpr Values<16, int4_bits> kInt4Values;

struct ScalarBase {
  using Elem = float;
  using Acc = Lanes;
  using Weights = Lanes;
  using Scale = float;
  struct Flag {};
  static constexpr int kElems = Lanes::kCount;
  static constexpr int kAccFloats = Lanes::kCount;
  static constexpr int kGroupVecs = 1;
  // A tile of sums is six of the sixteen registers, two to a sum.
  static constexpr int kRows = 1;
  static constexpr int kTokens = 3;
  static constexpr int64_t kTokenChunk = 24;
  static constexpr int64_t kChunkBlocks = 4;
  static constexpr int kFewRows = 2;
  static constexpr int kMaxFew = 2;
  static constexpr int one_stream_rows(int) { return 2; }
  static constexpr int kMaxFewOneStream = 2;
  static constexpr float kScaleFold = 1.0f;
  static constexpr bool kShareActivations = false;
  static constexpr int kScaleChunk = 0;
  static constexpr int kWidenedBytes = 0;

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

struct F32Codes : ScalarBase {
  static constexpr int kWeightBits = 32;
  static float value(const uint8_t* src, int i) { return load_f32(src + 4 * i); }
};
struct Bf16Codes : ScalarBase {
  static constexpr int kWeightBits = 16;
  static float value(const uint8_t* src, int i) { return load_bf16(src + 2 * i); }
};
struct Fp8Codes : ScalarBase {
  static constexpr int kWeightBits = 8;
  static float value(const uint8_t* src, int i) { return kFp8Values.v[src[i]]; }
};
struct Int4Codes : ScalarBase {
  static constexpr int kWeightBits = 4;
  static float value(const uint8_t* src, int i) {
    return kInt4Values.v[src[i / 2] >> i % 2 * 4 & 15];
  }
};
struct Fp4Codes : ScalarBase {
  static constexpr int kWeightBits = 4;
  static float value(const uint8_t* src, int i) {
    return kFp4Values.v[src[i / 2] >> i % 2 * 4 & 15];
  }
};

template <class Codes>
struct Scalar : Codes {
  static void decode(const uint8_t* src, Lanes (&out)[1], ScalarBase::Flag&) {
    float value[ScalarBase::kElems];
    for (int i = 0; i < ScalarBase::kElems; ++i) value[i] = Codes::value(src, i);
    out[0] = ScalarBase::load(value);
  }
};

template <class Codes, class Scaling>
struct ScalarGroups : Scalar<Codes>, Scaling {
  static constexpr int kFlushVecs = Scaling::kGroupCols / ScalarBase::kElems;
  static float load_scale(const uint8_t* scales, int i) {
    return load_group_scale<Scaling>(scales + i * Scaling::kScaleBytes);
  }
};

template <int kCols>
struct ScalarUint4 : ScalarBase, Uint4Scaled<kCols> {
  static constexpr int kWeightBits = 4;
  static constexpr int kFlushVecs = kCols / kElems;
  static void decode(const uint8_t* src, const uint8_t* scales, int at, Lanes (&out)[1]) {
    const int zero_point = load_zero(scales + at / kCols * 4);
    float value[kElems];
    for (int i = 0; i < kElems; ++i) {
      value[i] = static_cast<float>((src[i / 2] >> i % 2 * 4 & 15) - zero_point);
    }
    out[0] = load(value);
  }
  static float load_scale(const uint8_t* scales, int i) { return load_f32_of_word(scales + 4 * i); }
};

}  // namespace

namespace isa_tables {

void fill_scalar(KernelTable& table, const Traits& traits) {
  for (MatmulKernel(&family)[kNumFormats] : table.matmul) {
    const auto set = [&family](WeightFormat format, const MatmulKernel& kernel) {
      family[static_cast<int>(format)] = kernel;
    };
    set(WeightFormat::kF32,
        rows_kernel<Plain<Scalar<F32Codes>>>(traits, "matmul_f32_f32_scalar", Isa::kScalar));
    set(WeightFormat::kBf16,
        rows_kernel<Plain<Scalar<Bf16Codes>>>(traits, "matmul_bf16_f32_scalar", Isa::kScalar));
    set(WeightFormat::kFp8Block, rows_kernel<ScalarGroups<Fp8Codes, BlockScaled>>(
                                     traits, "matmul_fp8block_f32_scalar", Isa::kScalar));
    set(WeightFormat::kFp8Channel, rows_kernel<Channels<Scalar<Fp8Codes>>>(
                                       traits, "matmul_fp8channel_f32_scalar", Isa::kScalar));
    set(WeightFormat::kInt4G32, rows_kernel<ScalarGroups<Int4Codes, Int4G32Scaled>>(
                                    traits, "matmul_int4g32_f32_scalar", Isa::kScalar));
    set(WeightFormat::kInt4G128, rows_kernel<ScalarGroups<Int4Codes, Int4G128Scaled>>(
                                     traits, "matmul_int4g128_f32_scalar", Isa::kScalar));
    set(WeightFormat::kMxfp4, rows_kernel<ScalarGroups<Fp4Codes, MxScaled>>(
                                  traits, "matmul_mxfp4_f32_scalar", Isa::kScalar));
    set(WeightFormat::kMxfp8, rows_kernel<ScalarGroups<Fp8Codes, MxScaled>>(
                                  traits, "matmul_mxfp8_f32_scalar", Isa::kScalar));
    set(WeightFormat::kUint4G32,
        rows_kernel<ScalarUint4<32>>(traits, "matmul_uint4g32_f32_scalar", Isa::kScalar));
    set(WeightFormat::kUint4G128,
        rows_kernel<ScalarUint4<128>>(traits, "matmul_uint4g128_f32_scalar", Isa::kScalar));
    set(WeightFormat::kNvfp4, rows_kernel<ScalarGroups<Fp4Codes, Nvfp4Scaled>>(
                                  traits, "matmul_nvfp4_f32_scalar", Isa::kScalar));
  }
}

}  // namespace isa_tables
}  // namespace jaxmoe

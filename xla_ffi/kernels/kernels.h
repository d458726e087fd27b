// Matmul kernels over stored weights: the table each instruction set fills in.
//
// A weight matrix is row-major [n, k] as shipped in checkpoints; y = x Wᵀ. Every kernel decodes
// weights exactly and accumulates in FP32. Nothing here knows XLA, Python or the runtime.
//
// Numerics contract (what makes results independent of batch composition):
//   * Within one (family, ISA, format) an output element y[i, n] depends on x[i, :] and w[n, :]
//   alone: the
//     order of additions never depends on how many rows i or n a call covers, nor on their tiling.
//   * Weights are never rounded: scales are applied in FP32 to the sum of the columns that share
//   one,
//     y = sum_g scale[n, g] * sum_{k in g} x[k] * w[n, k], or folded into the weights where the
//     product is exact in the type that is multiplied.
//   * Error bound held by the tests: |err| <= c * eps * sum |w| |x|.
#ifndef JAXMOE_KERNELS_KERNELS_H_
#define JAXMOE_KERNELS_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace jaxmoe {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
inline constexpr int kNumIsas = 5;

enum class WeightFormat : int {
  kF32 = 0,
  kBf16 = 1,
  kFp8Block = 2,    // E4M3FN, an FP32 scale per 128x128 block (multiply to dequantize)
  kFp8Channel = 3,  // E4M3FN, an FP32 scale per row
  kInt4G32 = 4,     // (nibble - 8) times a BF16 scale per 32 columns of a row
  kInt4G128 = 5,    // the same per 128 columns
  kMxfp4 = 6,       // E2M1 nibbles times 2^(scale - 127) per 32 columns of a row
  kMxfp8 = 7,       // E4M3FN times 2^(scale - 127) per 32 columns of a row
  kUint4G32 = 8,    // (nibble - zero point) times a scale, both per 32 columns of a row
  kUint4G128 = 9,   // the same per 128 columns
  kNvfp4 = 10,      // E2M1 nibbles times an E4M3FN scale per 16 columns and an FP32 one per row
};
inline constexpr int kNumFormats = 11;

// kE8m0: a byte e that stands for 2^(e - 127), e = 0 exact too; 255 (NaN by its definition) is not
// for stored weights: what a kernel makes of it is infinite or NaN.
// kF32Zero: a word whose low five bits are the zero point, 0 to 16, and the others an FP32 scale of
// at most 11 significant bits (FP16's or BF16's).
// kE4m3: E4M3FN without its NaN, and behind the last of a row the FP32 factor of that row.
enum class ScaleType : int { kNone = 0, kF32 = 1, kBf16 = 2, kE8m0 = 3, kF32Zero = 4, kE4m3 = 5 };

enum class ActivationType : int { kF32 = 0, kBf16 = 1 };

// Which arithmetic a program asks for. The caller fixes it per compiled program (decode: kVector,
// prefill: kMatrix), never per row count, so a token's result does not depend on what else is in
// its step.
//   kVector: weights decoded to FP32, FP32 FMA with FP32 activations. Any activation type, exact
//   products. kMatrix: the fastest many-row form the ISA has (AMX tiles, vdpbf16ps) on BF16
//   activations; where the ISA
//            has none, or activations are F32, the table holds the kVector kernel.
//   kVectorBf16: what kVector means for BF16 activations, see select_kernel; not for programs to
//   ask
//            for. The kVector kernel, or vdpbf16ps where the CPU runs it as fast as an FP32 FMA:
//            its products are exact too, and it needs half the activations' bytes.
enum class Family : int { kVector = 0, kMatrix = 1, kVectorBf16 = 2 };
inline constexpr int kNumFamilies = 3;

inline constexpr int64_t kScaleBlock = 128;  // rows and columns of kFp8Block's blocks

// One matrix, or (through data/row offsets) the rows of it that one NUMA node holds. Two nibbles
// share a byte, the first column in the low half. formats.h says which scales a format has; k is a
// multiple of its group where that is one of columns.
struct WeightView {
  const uint8_t* data = nullptr;   // element [0, 0]
  const uint8_t* scale = nullptr;  // of element [0, 0], of the format's type; or none
  int64_t n = 0;                   // rows (outputs)
  int64_t k = 0;                   // columns (inputs)
  int64_t row_stride_bytes = 0;
  int64_t scale_stride = 0;  // scales between rows of scales
  WeightFormat format = WeightFormat::kBf16;
};

// Prepared activations come in two steps so that work is shared as far as it can be:
//   prepare: once per op, row by row (any subset of rows, so workers can share it): converts
//   m_total rows
//            into the kernel's element type, leading dimension `prepared_ld(k)` elements.
//   panel:   once per group of rows that meet the same weights (the tokens of one expert): gathers
//   rows
//            row_ids[0..m) into the kernel's tile order. Kernels with panel_bytes == nullptr index
//            rows of the prepared matrix directly and need no panel.
struct MatmulKernel {
  const char* name;  // e.g. "matmul_fp8block_f32fma_avx2"
  Isa isa;

  // Bytes of one prepared row of k columns (64-byte multiple).
  size_t (*prepared_row_bytes)(int64_t k);
  // Converts rows [row_begin, row_end) of x ([*, k], leading dimension ldx elements).
  void (*prepare)(ActivationType type, const void* x, int64_t ldx, int64_t k, int64_t row_begin,
                  int64_t row_end, void* prepared);

  // nullptr: no panel step. Otherwise bytes of a panel for m rows of k columns.
  size_t (*panel_bytes)(int64_t m, int64_t k);
  void (*make_panel)(const void* prepared, int64_t k, const int32_t* row_ids, int64_t m,
                     void* panel);

  // y[i * ldy + (n - n_begin)] = sum_k x[row_i, k] w[n, k] for n in [n_begin, n_end), i in [0, m).
  // `x` is the panel where the kernel has one (row_ids unused), else the prepared matrix with row_i
  // = row_ids[i] (row_ids == nullptr: row_i = i). Any n range, any m >= 0, any k >= 1.
  void (*matmul)(const WeightView& w, int64_t n_begin, int64_t n_end, const void* x,
                 const int32_t* row_ids, int64_t m, float* y, int64_t ldy);
};

// The table of one ISA; entries are never null (an ISA without its own form of a kernel lists the
// best form a lower ISA has, under that form's name).
struct KernelTable {
  Isa isa;
  MatmulKernel matmul[kNumFamilies][kNumFormats];
};

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // by this CPU and operating system (AMX: permission obtained)
Isa best_isa();               // highest supported
const char* isa_reason();     // one line: why best_isa() was chosen, what is missing for the next
const KernelTable& kernel_table(Isa isa);  // isa must be supported

// The family whose entry a program should use: its own, but kVector where activations are F32 and
// must stay so, and kVectorBf16 for kVector with BF16 ones. (A kMatrix kernel's `prepare` rounds
// F32 rows to BF16, to nearest even: for callers that mean it.)
Family select_family(Family family, ActivationType activation);
const MatmulKernel& select_kernel(const KernelTable& table, Family family, WeightFormat format,
                                  ActivationType activation);

// AMX tile state is per thread: every worker calls this once before its first kernel (no-op
// otherwise), and release when it sleeps or ends.
void kernel_thread_init(Isa isa);
void kernel_thread_release(Isa isa);

// Element-wise helpers used by the experts core, one per ISA is not worth it: compiled for the
// baseline.
float fp8_e4m3_to_float(uint8_t code);  // OCP E4M3FN: 0x7F and 0xFF are NaN, subnormals exact
float fp4_e2m1_to_float(uint8_t code);  // OCP E2M1, of the low four bits
float e8m0_to_float(uint8_t code);      // OCP E8M0: 2^(code - 127), 255 is NaN
float bf16_to_float(uint16_t bits);
uint16_t float_to_bf16(float value);  // round to nearest even, NaN stays NaN

// Decode attention over a paged KV cache; see attention.h for its contract.

}  // namespace jaxmoe

#endif  // JAXMOE_KERNELS_KERNELS_H_

// Every matrix kernel this CPU has on any shape, row range and FP8 codes, against the scalar one.
#include <cmath>
#include <memory>
#include <vector>

#include "fuzz_input.h"
#include "kernels/kernels.h"

using namespace jaxmoe;

namespace {

std::vector<float> run(const MatmulKernel& kernel, const WeightView& w, int64_t begin, int64_t end,
                       const std::vector<float>& x, int64_t m) {
  // Exactly as much memory as is asked for: a sanitizer sees a byte too many.
  std::vector<uint8_t> prepared(kernel.prepared_row_bytes(w.k) * static_cast<size_t>(m) + 64);
  void* aligned = prepared.data();
  size_t room = prepared.size();
  aligned = std::align(64, room - 64, aligned, room);
  kernel.prepare(ActivationType::kF32, x.data(), w.k, w.k, 0, m, aligned);
  std::vector<uint8_t> panel_space;
  const void* operand = aligned;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < m; ++i) ids.push_back(static_cast<int32_t>(i));
  if (kernel.panel_bytes != nullptr) {
    panel_space.resize(kernel.panel_bytes(m, w.k) + 64);
    void* panel = panel_space.data();
    room = panel_space.size();
    panel = std::align(64, room - 64, panel, room);
    kernel.make_panel(aligned, w.k, ids.data(), m, panel);
    operand = panel;
  }
  std::vector<float> y(static_cast<size_t>(m * (end - begin)));
  kernel.matmul(w, begin, end, operand, ids.data(), m, y.data(), end - begin);
  return y;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  jaxmoe_fuzz::Input input(data, size);
  const int64_t n = input.between(1, 150), k = 1 + (input.word() & 0x1ff), m = input.between(1, 9);
  int64_t begin = input.between(0, n), end = input.between(0, n);
  if (begin > end) std::swap(begin, end);
  std::vector<uint8_t> codes(static_cast<size_t>(n * k));
  uint32_t state = static_cast<uint32_t>(input.word()) | 1;
  for (uint8_t& code : codes) {
    code = static_cast<uint8_t>((state = state * 1664525u + 1013904223u) >> 24) ^ input.byte();
    if ((code & 0x7f) == 0x7f) code = 0;  // NaN has no use in a comparison
  }
  std::vector<float> scales(static_cast<size_t>(((n + 127) / 128) * ((k + 127) / 128)));
  for (float& s : scales) s = std::ldexp(1.0f, static_cast<int>(input.between(0, 20)) - 10);
  std::vector<float> x(static_cast<size_t>(m * k));
  for (float& v : x) v = static_cast<float>(static_cast<int8_t>(input.byte())) / 16 + 0.25f;
  WeightView w;
  w.data = codes.data();
  w.scale = reinterpret_cast<const uint8_t*>(scales.data());
  w.n = n;
  w.k = k;
  w.row_stride_bytes = k;
  w.scale_stride = (k + 127) / 128;
  w.format = WeightFormat::kFp8Block;
  const MatmulKernel& oracle = select_kernel(kernel_table(Isa::kScalar), Family::kVector,
                                             WeightFormat::kFp8Block, ActivationType::kF32);
  const std::vector<float> want = run(oracle, w, begin, end, x, m);
  for (int isa = 0; isa < 8; ++isa) {
    if (static_cast<Isa>(isa) > best_isa()) break;
    if (!isa_supported(static_cast<Isa>(isa))) continue;
    kernel_thread_init(static_cast<Isa>(isa));
    const MatmulKernel& kernel = select_kernel(kernel_table(static_cast<Isa>(isa)), Family::kVector,
                                               WeightFormat::kFp8Block, ActivationType::kF32);
    const std::vector<float> got = run(kernel, w, begin, end, x, m);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t row = begin; row < end; ++row) {
        double sum = 0;
        for (int64_t j = 0; j < k; ++j) {
          sum += std::fabs(static_cast<double>(fp8_e4m3_to_float(codes[row * k + j])) *
                           scales[(row / 128) * w.scale_stride + j / 128] * x[i * k + j]);
        }
        const size_t at = static_cast<size_t>(i * (end - begin) + row - begin);
        jaxmoe_fuzz::require(std::fabs(got[at] - want[at]) <= 1e-4 * sum + 1e-30,
                             "a kernel agrees with the scalar one");
      }
    }
  }
  return 0;
}

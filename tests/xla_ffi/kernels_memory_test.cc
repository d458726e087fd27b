// No kernel reads past the last byte of a matrix, its scales or its activations: each ends at a
// page that may not be touched. (Sanitizers do not see vector loads made by intrinsics' builtins on
// every compiler; a page does.)
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "kernels_fixture.h"

using namespace jaxmoe_test;

namespace {

// Bytes that end (or begin) exactly at an inaccessible page.
class Guarded {
 public:
  Guarded(const void* source, size_t bytes, bool guard_front) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (bytes + page - 1) / page * page;
    total_ = body + 2 * page;
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) std::abort();
    data_ = guard_front ? base_ + page : base_ + page + body - bytes;
    if (bytes > 0) std::memcpy(data_, source, bytes);
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + body, page, PROT_NONE);
  }
  ~Guarded() { munmap(base_, total_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t* base_;
  uint8_t* data_;
  size_t total_;
};

}  // namespace

JAXMOE_TEST(no_read_outside_the_matrix) {
  for_each_kernel([](const MatmulKernel& kernel, Family, WeightFormat format) {
    for (int64_t columns : {1, 3, 31, 64, 127, 128, 129, 200, 384}) {
      const int64_t k = padded_columns(format, columns);
      for (int64_t n : {1, 7, 16, 19}) {
        Weights weights(format, n, k);
        weights.randomize(k + n);
        for (bool guard_front : {false, true}) {
          const Guarded bytes(weights.bytes.data(), weights.bytes.size(), guard_front);
          const Guarded scale(weights.scale.data(), weights.scale.size(), guard_front);
          WeightView view = weights.view(bytes.data());
          if (view.scale != nullptr) view.scale = scale.data();
          for (int64_t m : {1, 2, 5}) {
            Activations x(m, k);
            const Guarded rows(x.bf16.data(), x.bf16.size() * 2, guard_front);
            auto prepared = aligned_bytes(kernel.prepared_row_bytes(k) * m);
            kernel.prepare(ActivationType::kBf16, rows.data(), k, k, 0, m, prepared.get());
            const void* operand = prepared.get();
            auto panel =
                aligned_bytes(kernel.panel_bytes == nullptr ? 64 : kernel.panel_bytes(m, k));
            if (kernel.panel_bytes != nullptr) {
              kernel.make_panel(prepared.get(), k, nullptr, m, panel.get());
              operand = panel.get();
            }
            std::vector<float> y(m * n);
            kernel.matmul(view, 0, n, operand, nullptr, m, y.data(), n);
            const std::vector<float> want = run(kernel, weights.view(), 0, n, x, iota(m));
            JAXMOE_CHECK(std::memcmp(y.data(), want.data(), y.size() * 4) == 0, "%s k %d n %d m %d",
                         kernel.name, static_cast<int>(k), static_cast<int>(n),
                         static_cast<int>(m));
          }
        }
      }
    }
  });
}

// Padding between rows is never part of the result: NaN everywhere outside changes nothing.
JAXMOE_TEST(bytes_between_rows_do_not_matter) {
  for_each_kernel([](const MatmulKernel& kernel, Family, WeightFormat format) {
    const int64_t k = padded_columns(format, 141);
    Weights weights(format, 21, k, 300);
    weights.bytes.assign(weights.bytes.size(), 0xFF);
    weights.randomize(8);
    Activations x(5, k);
    for (float value : run(kernel, weights.view(), 0, 21, x, iota(5))) {
      JAXMOE_CHECK(!std::isnan(value), "%s", kernel.name);
    }
  });
}

JAXMOE_TEST_MAIN

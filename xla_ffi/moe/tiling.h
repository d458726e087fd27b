// How many weight rows one unit of work takes.
#ifndef JAXMOE_MOE_TILING_H_
#define JAXMOE_MOE_TILING_H_

#include <algorithm>
#include <cstdint>

namespace jaxmoe {

// A unit should stream long enough that taking it (about 0.1 us) and starting its streams cost
// nothing, and every thread should get several, so that the slowest ends at most a fraction of its
// share late.
//   256 KiB: 10 to 25 us at one core's 10 to 25 GB/s; more gains nothing.
//    16 KiB: about 1 us; less would be hand-out.
//   8 units a thread: the last unit is at most an eighth of a thread's work.
// `step` is the granule the kernels like (rows of a register tile); results never depend on the
// choice.
inline int64_t rows_per_unit(int64_t total_rows, int64_t bytes_per_row, int threads, int64_t step) {
  constexpr int64_t kMostBytes = 256 << 10, kLeastBytes = 16 << 10, kUnitsPerThread = 8;
  const int64_t share = total_rows * bytes_per_row / (kUnitsPerThread * std::max(threads, 1));
  const int64_t bytes = std::clamp(share, kLeastBytes, kMostBytes);
  const int64_t rows = bytes / std::max<int64_t>(bytes_per_row, 1) / step * step;
  return std::max(step, std::min(rows, (total_rows + step - 1) / step * step));
}

}  // namespace jaxmoe

#endif  // JAXMOE_MOE_TILING_H_

// How many weight rows one unit of work takes.
#ifndef JAXMOE_MOE_TILING_H_
#define JAXMOE_MOE_TILING_H_

#include <algorithm>
#include <cstdint>

namespace jaxmoe {

// A unit should stream long enough that taking it (about 0.1 us) and starting its streams cost
// nothing, and every thread should get several, so that the slowest ends at most a fraction of its
// share late.
//   Most, few tokens (CpuRuntime::few_tokens): 4 MiB. A run of memory begins at half speed: on Zen
//   4 runs of 64 KiB in random
//     places are read at 0.68 of the ceiling, of 256 KiB at 0.9, of 1 MiB at 1.0.
//   Most, many tokens: 256 KiB, so that a unit's results stay in a core's second-level cache.
//   Least: 16 KiB, about 1 us; less would be hand-out.
//   8 units a thread: the last unit is at most an eighth of a thread's work.
// `step` is the granule the kernels like (rows of a register tile); results never depend on the
// choice.
inline int64_t rows_per_unit(int64_t total_rows, int64_t bytes_per_row, int threads, int64_t step,
                             bool few_tokens) {
  constexpr int64_t kLeastBytes = 16 << 10, kUnitsPerThread = 8;
  const int64_t most_bytes = few_tokens ? 4 << 20 : 256 << 10;
  const int64_t share = total_rows * bytes_per_row / (kUnitsPerThread * std::max(threads, 1));
  const int64_t bytes = std::clamp(share, kLeastBytes, most_bytes);
  const int64_t rows = bytes / std::max<int64_t>(bytes_per_row, 1) / step * step;
  return std::max(step, std::min(rows, (total_rows + step - 1) / step * step));
}

// Rows of the next unit where `rows` are left and a unit reads a short run of memory in each of
// many matrices: half of an even share, so that the first units have long runs and the last ones,
// of `least` rows, end together.
inline int64_t guided_rows(int64_t rows, int threads, int64_t least, int64_t step) {
  const int64_t take = rows / (2 * std::max(threads, 1)) / step * step;
  return std::min(rows, std::max(take, least));
}

}  // namespace jaxmoe

#endif  // JAXMOE_MOE_TILING_H_

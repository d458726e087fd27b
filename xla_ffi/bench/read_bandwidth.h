// The read-bandwidth ceiling every bandwidth figure of jaxmoe is stated against: what this machine
// delivers when the same number of threads only reads, measured in the same process and minute.
#ifndef JAXMOE_BENCH_READ_BANDWIDTH_H_
#define JAXMOE_BENCH_READ_BANDWIDTH_H_

#include <cstdint>
#include <vector>

namespace jaxmoe {

// Reads `total_bytes` of huge-page memory, split evenly over one thread per entry of `cpus` (each
// pinned there, its part first touched there), `repeats` times in each of two ways; returns the
// bytes per second of each repeat's better way. `total_bytes` must be far larger than the
// last-level cache for the figure to mean DRAM. Throws std::bad_alloc or std::runtime_error when
// memory or threads cannot be had.
std::vector<double> read_bandwidth(const std::vector<int>& cpus, int64_t total_bytes, int repeats);

}  // namespace jaxmoe

#endif  // JAXMOE_BENCH_READ_BANDWIDTH_H_

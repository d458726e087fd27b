#include "bench/read_bandwidth.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

namespace jaxmoe {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

constexpr int kStreams = 8;
constexpr int64_t kLineWords = 8;
// Far enough ahead to cover DRAM latency at tens of GB/s, near enough to stay in the first-level
// cache.
constexpr int64_t kPrefetchWords = 256;

// Which way of reading is fastest differs between machines: one stream lives from the hardware
// prefetcher, which some virtual machines hardly have; several streams with software prefetch do
// without it. The ceiling is the better of the two.
uint64_t read_one_stream(const uint64_t* words, int64_t count) {
  uint64_t sum[kLineWords] = {};
  for (int64_t i = 0; i + kLineWords <= count; i += kLineWords) {
    for (int lane = 0; lane < kLineWords; ++lane) sum[lane] += words[i + lane];
  }
  uint64_t total = 0;
  for (uint64_t part : sum) total += part;
  return total;
}

uint64_t read_many_streams(const uint64_t* words, int64_t count) {
  uint64_t sum[kLineWords] = {};
  const int64_t part = count / kStreams / kLineWords * kLineWords;
  for (int64_t i = 0; i < part; i += kLineWords) {
    for (int stream = 0; stream < kStreams; ++stream) {
      const uint64_t* line = words + stream * part + i;
      __builtin_prefetch(line + kPrefetchWords, 0, 3);
      for (int lane = 0; lane < kLineWords; ++lane) sum[lane] += line[lane];
    }
  }
  uint64_t total = 0;
  for (uint64_t lane : sum) total += lane;
  return total;
}

}  // namespace

std::vector<double> read_bandwidth(const std::vector<int>& cpus, int64_t total_bytes, int repeats) {
  if (cpus.empty() || repeats < 1 || total_bytes < static_cast<int64_t>(cpus.size()) * kHugePage) {
    throw std::runtime_error(
        "read_bandwidth needs at least one cpu, one repeat and 2 MiB a thread");
  }
  const int num_threads = static_cast<int>(cpus.size());
  const int64_t part_bytes = total_bytes / num_threads / kHugePage * kHugePage;
  std::vector<double> rates(repeats);
  std::barrier sync(num_threads);
  std::chrono::steady_clock::time_point start;
  std::atomic<uint64_t> sink{0};
  std::atomic<bool> failed{false};

  auto body = [&](int thread_idx) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpus[thread_idx], &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
    void* memory =
        mmap(nullptr, part_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      failed = true;
    } else {
      madvise(memory, part_bytes, MADV_HUGEPAGE);
      std::memset(memory, 1, part_bytes);
    }
    sync.arrive_and_wait();
    if (!failed) {
      // On virtual machines memory is slow to read for the first time: one round more, not counted.
      for (int round = -2; round < 2 * repeats; ++round) {
        auto* read = round % 2 ? read_many_streams : read_one_stream;
        sync.arrive_and_wait();
        if (thread_idx == 0) start = std::chrono::steady_clock::now();
        sync.arrive_and_wait();
        sink += read(static_cast<const uint64_t*>(memory), part_bytes / 8);
        sync.arrive_and_wait();
        if (thread_idx == 0 && round >= 0) {
          std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
          double rate = static_cast<double>(part_bytes) * num_threads / elapsed.count();
          rates[round / 2] = std::max(rates[round / 2], rate);
        }
      }
    }
    if (memory != MAP_FAILED) munmap(memory, part_bytes);
  };

  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
  if (failed) throw std::bad_alloc();
  return rates;
}

}  // namespace jaxmoe

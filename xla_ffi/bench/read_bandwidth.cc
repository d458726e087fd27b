#include "bench/read_bandwidth.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

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

// Eight independent accumulators over whole cache lines: enough loads in flight to be bound by memory, whatever
// width the compiler picks for them.
uint64_t read_all(const uint64_t* words, int64_t count) {
  uint64_t sum[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sum[lane] += words[i + lane];
  }
  uint64_t total = 0;
  for (uint64_t part : sum) total += part;
  return total;
}

}  // namespace

std::vector<double> read_bandwidth(const std::vector<int>& cpus, int64_t total_bytes, int repeats) {
  if (cpus.empty() || repeats < 1 || total_bytes < static_cast<int64_t>(cpus.size()) * kHugePage) {
    throw std::runtime_error("read_bandwidth needs at least one cpu, one repeat and 2 MiB a thread");
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
    void* memory = mmap(nullptr, part_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      failed = true;
    } else {
      madvise(memory, part_bytes, MADV_HUGEPAGE);
      std::memset(memory, 1, part_bytes);
    }
    sync.arrive_and_wait();
    if (!failed) {
      for (int repeat = 0; repeat < repeats; ++repeat) {
        sync.arrive_and_wait();
        if (thread_idx == 0) start = std::chrono::steady_clock::now();
        sync.arrive_and_wait();
        sink += read_all(static_cast<const uint64_t*>(memory), part_bytes / 8);
        sync.arrive_and_wait();
        if (thread_idx == 0) {
          std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
          rates[repeat] = static_cast<double>(part_bytes) * num_threads / elapsed.count();
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

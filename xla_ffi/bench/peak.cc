#include "bench/peak.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "runtime/float_mode.h"

namespace jaxmoe {
namespace {

// Long beside the clock and a barrier, short beside a benchmark: the slowest loop (SSE) takes about
// 20 ms a repeat.
constexpr double kSeconds = 0.02;

}  // namespace

std::vector<PeakLoop> peak_loops(Isa isa) {
  static const PeakLoop all[] = {
      {"f32_mul_add_scalar", Isa::kScalar, peak_isa::fma_scalar},
      {"f32_fma_avx2", Isa::kAvx2, peak_isa::fma_avx2},
      {"f32_fma_avx512", Isa::kAvx512, peak_isa::fma_avx512},
      {"bf16_dot_avx512bf16", Isa::kAvx512Bf16, peak_isa::dot_bf16_avx512},
      {"bf16_tiles_amx", Isa::kAmx, peak_isa::tiles_bf16_amx},
  };
  std::vector<PeakLoop> loops;
  for (const PeakLoop& loop : all) {
    if (loop.isa <= isa && isa_supported(loop.isa)) loops.push_back(loop);
  }
  return loops;
}

std::vector<double> peak_flops(const PeakLoop& loop, const std::vector<int>& cpus, int repeats) {
  if (cpus.empty() || repeats < 1) throw std::runtime_error("peak_flops needs a cpu and a repeat");
  using Clock = std::chrono::steady_clock;
  const int num_threads = static_cast<int>(cpus.size());
  std::vector<double> rates;
  std::barrier sync(num_threads);
  std::vector<Clock::time_point> ends(cpus.size());
  Clock::time_point start;
  int64_t rounds = 0;
  auto body = [&](int idx) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpus[idx], &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
    const FloatMode mode;
    kernel_thread_init(loop.isa);
    float sink = 0;
    if (idx == 0) {
      int64_t tried = 1 << 10;
      for (;;) {
        const Clock::time_point tried_at = Clock::now();
        loop.run(tried, &sink);
        const double taken = std::chrono::duration<double>(Clock::now() - tried_at).count();
        if (taken > kSeconds / 8) {
          rounds = static_cast<int64_t>(static_cast<double>(tried) * kSeconds / taken) + 1;
          break;
        }
        tried *= 2;
      }
    }
    for (int repeat = 0; repeat < repeats; ++repeat) {
      // The clock is read before anyone begins: a thread that lost its CPU must not shorten the
      // time.
      sync.arrive_and_wait();
      if (idx == 0) start = Clock::now();
      sync.arrive_and_wait();
      const double flops = loop.run(rounds, &sink);
      ends[idx] = Clock::now();
      sync.arrive_and_wait();
      if (idx == 0) {
        const std::chrono::duration<double> taken =
            *std::max_element(ends.begin(), ends.end()) - start;
        rates.push_back(flops * static_cast<double>(rounds) * num_threads / taken.count());
      }
    }
    kernel_thread_release(loop.isa);
    volatile float keep = sink;
    static_cast<void>(keep);
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
  return rates;
}

}  // namespace jaxmoe

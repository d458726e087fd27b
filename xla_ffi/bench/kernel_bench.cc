// How close the matmul kernels come to the machine: GEMV bytes per second over cold weights as a
// fraction of the read ceiling measured beside it, and GEMM rates at a few row counts.
//   kernel_bench [gemv_megabytes=512] [n=2048] [k=7168] [isa name, default all but scalar]
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "bench/read_bandwidth.h"
#include "kernels/kernels.h"

namespace {

using namespace jaxmoe;

constexpr int kRepeats = 5;
const char* const kFormatNames[] = {"f32", "bf16", "fp8"};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(size_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  void* p = std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) / kHugePage * kHugePage);
  if (p == nullptr) {
    std::fprintf(stderr, "no memory for %zu bytes\n", bytes);
    std::exit(EXIT_FAILURE);
  }
  madvise(p, bytes, MADV_HUGEPAGE);
  return Buffer(p);
}

int weight_bytes(WeightFormat format) {
  return format == WeightFormat::kF32 ? 4 : (format == WeightFormat::kBf16 ? 2 : 1);
}

// Ordinary finite weights of any format: bytes whose top exponent bits never are all set.
void fill(uint8_t* bytes, size_t count) {
  uint64_t state = 88172645463325252u;
  for (size_t i = 0; i + 8 <= count; i += 8) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    const uint64_t word = state & 0xBFBFBFBFBFBFBFBFu;
    std::memcpy(bytes + i, &word, 8);
  }
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Problem {
  const MatmulKernel* kernel;
  Isa isa;
  WeightFormat format;
  int64_t matrices, n, k, m;
};

// Seconds for every matrix once, its rows split over the threads; median of kRepeats.
double seconds(const Problem& p, const uint8_t* weights, const float* scale, int num_threads) {
  Buffer x = allocate(static_cast<size_t>(p.m * p.k) * 4);
  for (int64_t i = 0; i < p.m * p.k; ++i) {
    static_cast<uint16_t*>(x.get())[i] = float_to_bf16(0.001f * static_cast<float>(i % 1999 - 999));
  }
  Buffer prepared = allocate(p.kernel->prepared_row_bytes(p.k) * p.m);
  p.kernel->prepare(ActivationType::kBf16, x.get(), p.k, p.k, 0, p.m, prepared.get());
  const void* operand = prepared.get();
  Buffer panel;
  if (p.kernel->panel_bytes != nullptr) {
    panel = allocate(p.kernel->panel_bytes(p.m, p.k));
    p.kernel->make_panel(prepared.get(), p.k, nullptr, p.m, panel.get());
    operand = panel.get();
  }
  Buffer y = allocate(static_cast<size_t>(p.m * p.n) * 4);
  const int64_t row_bytes = p.k * weight_bytes(p.format);
  std::barrier sync(num_threads + 1);
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, t] {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(t, &set);
      sched_setaffinity(0, sizeof(set), &set);
      kernel_thread_init(p.isa);
      const int64_t begin = p.n * t / num_threads, end = p.n * (t + 1) / num_threads;
      for (int repeat = 0; repeat <= kRepeats; ++repeat) {
        sync.arrive_and_wait();
        for (int64_t i = 0; i < p.matrices; ++i) {
          WeightView w{weights + i * p.n * row_bytes,
                       scale,
                       p.n,
                       p.k,
                       row_bytes,
                       (p.k + 127) / 128,
                       p.format};
          p.kernel->matmul(w, begin, end, operand, nullptr, p.m,
                           static_cast<float*>(y.get()) + begin, p.n);
        }
        sync.arrive_and_wait();
      }
      kernel_thread_release(p.isa);
    });
  }
  std::vector<double> times;
  for (int repeat = 0; repeat <= kRepeats; ++repeat) {
    sync.arrive_and_wait();
    const auto start = std::chrono::steady_clock::now();
    sync.arrive_and_wait();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (repeat > 0) times.push_back(elapsed.count());
  }
  for (std::thread& thread : threads) thread.join();
  return median(times);
}

double ceiling(int num_threads) {
  std::vector<int> cpus;
  for (int t = 0; t < num_threads; ++t) cpus.push_back(t);
  return median(read_bandwidth(cpus, int64_t{512} << 20, kRepeats));
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t bytes = (argc > 1 ? std::atoll(argv[1]) : 512) << 20;
  const int64_t n = argc > 2 ? std::atoll(argv[2]) : 2048;
  const int64_t k = argc > 3 ? std::atoll(argv[3]) : 7168;
  const char* only = argc > 4 ? argv[4] : nullptr;
  if (bytes <= 0 || n <= 0 || k <= 0) {
    std::fprintf(stderr, "usage: kernel_bench [gemv_megabytes] [n] [k] [isa]\n");
    return EXIT_FAILURE;
  }
  Buffer weights = allocate(std::max(bytes, n * k * 4));
  fill(static_cast<uint8_t*>(weights.get()), std::max(bytes, n * k * 4));
  std::vector<float> scale(((n + 127) / 128) * ((k + 127) / 128), 0.01f);
  std::printf("%s\n", isa_reason());
  for (int i = 0; i < kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_supported(isa)) continue;
    if (only == nullptr ? isa == Isa::kScalar : std::strcmp(only, isa_name(isa)) != 0) continue;
    for (int family = 0; family < kNumFamilies; ++family) {
      for (int f = kNumFormats - 1; f >= 0; --f) {
        const WeightFormat format = static_cast<WeightFormat>(f);
        const MatmulKernel& kernel = kernel_table(isa).matmul[family][f];
        if (kernel.isa != isa) continue;
        bool listed = false;
        for (int before = 0; before < family; ++before) {
          listed |= kernel.name == kernel_table(isa).matmul[before][f].name;
        }
        if (listed) continue;
        const int64_t matrix_bytes = n * k * weight_bytes(format);
        const int64_t matrices = std::max<int64_t>(1, bytes / matrix_bytes);
        const uint8_t* data = static_cast<const uint8_t*>(weights.get());
        for (int threads : {1, 2}) {
          std::printf("%-34s %s k=%lld n=%lld threads=%d cold:", kernel.name, kFormatNames[f],
                      static_cast<long long>(k), static_cast<long long>(n), threads);
          for (int64_t m : {1, 2, 4, 8}) {
            const double limit = ceiling(threads);
            const double time =
                seconds({&kernel, isa, format, matrices, n, k, m}, data, scale.data(), threads);
            const double rate = static_cast<double>(matrix_bytes * matrices) / time;
            std::printf("  m=%lld %.2f of %.1f GB/s", static_cast<long long>(m), rate / limit,
                        limit * 1e-9);
            std::fflush(stdout);
          }
          std::printf("\n");
        }
        std::printf("%-34s GFLOP/s, 1 thread:", kernel.name);
        for (int64_t m : {8, 64, 256}) {
          const double time = seconds({&kernel, isa, format, 1, n, k, m}, data, scale.data(), 1);
          std::printf("  m=%lld %.0f", static_cast<long long>(m),
                      2e-9 * static_cast<double>(m * n * k) / time);
          std::fflush(stdout);
        }
        std::printf("\n");
      }
    }
  }
  return EXIT_SUCCESS;
}

// How close the matmul kernels come to the machine: GEMV bytes per second over cold weights as a
// fraction of the read ceiling measured beside it, and GEMM rates at a few row counts.
//   kernel_bench [gemv_megabytes=512] [n=2048] [k=7168] [isa name, default all but scalar]
//                [format, default all]
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
#include "kernels/formats.h"
#include "kernels/kernels.h"

namespace {

using namespace jaxmoe;

constexpr int kRepeats = 5;

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

// Ordinary finite weights of any format: bytes whose top exponent bits never are all set.
void fill_data(uint8_t* bytes, size_t count) {
  uint64_t state = 88172645463325252u;
  for (size_t i = 0; i + 8 <= count; i += 8) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    const uint64_t word = state & 0xBFBFBFBFBFBFBFBFu;
    std::memcpy(bytes + i, &word, 8);
  }
}

// Data and scales of matrices, one after the other.
struct Shape {
  WeightFormat format;
  int64_t n, k;

  int64_t data_bytes() const { return n * weight_row_bytes(format, k); }
  int64_t scale_cols() const { return scale_dims(format, n, k).second; }
  int64_t num_scales() const { return scale_dims(format, n, k).first * scale_cols(); }
  int64_t bytes() const {
    return data_bytes() + num_scales() * scale_bytes(format_info(format).scale_type);
  }
  int64_t stride() const { return (bytes() + 63) / 64 * 64; }
  WeightView view(const uint8_t* weights, int64_t i) const {
    const uint8_t* data = weights + i * stride();
    const bool scaled = format_info(format).scaled();
    return {data,
            scaled ? data + data_bytes() : nullptr,
            n,
            k,
            weight_row_bytes(format, k),
            scale_cols(),
            format};
  }
  void fill(uint8_t* weights, int64_t count) const {
    const uint8_t power = 120;
    const float factor = 0.01f;
    const uint16_t half = float_to_bf16(factor);
    const ScaleType type = format_info(format).scale_type;
    const void* scale = type == ScaleType::kF32    ? static_cast<const void*>(&factor)
                        : type == ScaleType::kBf16 ? static_cast<const void*>(&half)
                                                   : &power;
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* data = weights + i * stride();
      fill_data(data, static_cast<size_t>(data_bytes()));
      for (int64_t j = 0; j < num_scales(); ++j) {
        std::memcpy(data + data_bytes() + j * scale_bytes(type), scale,
                    static_cast<size_t>(scale_bytes(type)));
      }
    }
  }
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Problem {
  const MatmulKernel* kernel;
  Isa isa;
  Shape shape;
  int64_t matrices, m;
};

// Seconds for every matrix once, its rows split over the threads; median of kRepeats.
double seconds(const Problem& p, const uint8_t* weights, int num_threads) {
  const int64_t n = p.shape.n, k = p.shape.k;
  Buffer x = allocate(static_cast<size_t>(p.m * k) * 4);
  for (int64_t i = 0; i < p.m * k; ++i) {
    static_cast<uint16_t*>(x.get())[i] = float_to_bf16(0.001f * static_cast<float>(i % 1999 - 999));
  }
  Buffer prepared = allocate(p.kernel->prepared_row_bytes(k) * p.m);
  p.kernel->prepare(ActivationType::kBf16, x.get(), k, k, 0, p.m, prepared.get());
  const void* operand = prepared.get();
  Buffer panel;
  if (p.kernel->panel_bytes != nullptr) {
    panel = allocate(p.kernel->panel_bytes(p.m, k));
    p.kernel->make_panel(prepared.get(), k, nullptr, p.m, panel.get());
    operand = panel.get();
  }
  Buffer y = allocate(static_cast<size_t>(p.m * n) * 4);
  // The threads take the time themselves: from the first one's begin to the last one's end.
  std::barrier sync(num_threads);
  std::vector<std::chrono::steady_clock::time_point> ends(num_threads);
  std::vector<double> times;
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, t] {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(t, &set);
      sched_setaffinity(0, sizeof(set), &set);
      kernel_thread_init(p.isa);
      const int64_t begin = n * t / num_threads, end = n * (t + 1) / num_threads;
      for (int repeat = 0; repeat <= kRepeats; ++repeat) {
        sync.arrive_and_wait();
        const auto start = std::chrono::steady_clock::now();
        for (int64_t i = 0; i < p.matrices; ++i) {
          const WeightView w = p.shape.view(weights, i);
          p.kernel->matmul(w, begin, end, operand, nullptr, p.m,
                           static_cast<float*>(y.get()) + begin, n);
        }
        ends[t] = std::chrono::steady_clock::now();
        sync.arrive_and_wait();
        if (t == 0 && repeat > 0) {
          const std::chrono::duration<double> elapsed =
              *std::max_element(ends.begin(), ends.end()) - start;
          times.push_back(elapsed.count());
        }
      }
      kernel_thread_release(p.isa);
    });
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
  const char* only = argc > 4 && argv[4][0] != 0 ? argv[4] : nullptr;
  const char* only_format = argc > 5 ? argv[5] : nullptr;
  if (bytes <= 0 || n <= 0 || k <= 0) {
    std::fprintf(stderr, "usage: kernel_bench [gemv_megabytes] [n] [k] [isa] [format]\n");
    return EXIT_FAILURE;
  }
  Buffer weights = allocate(std::max(bytes, n * k * 4));
  std::printf("%s\n", isa_reason());
  for (int i = 0; i < kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_supported(isa)) continue;
    if (only == nullptr ? isa == Isa::kScalar : std::strcmp(only, isa_name(isa)) != 0) continue;
    for (int family = 0; family < kNumFamilies; ++family) {
      for (int f = kNumFormats - 1; f >= 0; --f) {
        const WeightFormat format = static_cast<WeightFormat>(f);
        const char* name = format_info(format).name;
        if (only_format != nullptr && std::strcmp(only_format, name) != 0) continue;
        if (!columns_suit(format, k)) continue;
        const MatmulKernel& kernel = kernel_table(isa).matmul[family][f];
        if (kernel.isa != isa) continue;
        bool listed = false;
        for (int before = 0; before < family; ++before) {
          listed |= kernel.name == kernel_table(isa).matmul[before][f].name;
        }
        if (listed) continue;
        const Shape shape{format, n, k};
        const int64_t matrices = std::max<int64_t>(1, bytes / shape.stride());
        uint8_t* data = static_cast<uint8_t*>(weights.get());
        shape.fill(data, matrices);
        for (int threads : {1, 2}) {
          std::printf("%-34s %s k=%lld n=%lld threads=%d cold:", kernel.name, name,
                      static_cast<long long>(k), static_cast<long long>(n), threads);
          for (int64_t m : {1, 2, 4, 8}) {
            const double limit = ceiling(threads);
            const double time = seconds({&kernel, isa, shape, matrices, m}, data, threads);
            const double rate = static_cast<double>(shape.bytes() * matrices) / time;
            std::printf("  m=%lld %.2f of %.1f GB/s", static_cast<long long>(m), rate / limit,
                        limit * 1e-9);
            std::fflush(stdout);
          }
          std::printf("\n");
        }
        std::printf("%-34s GFLOP/s, 1 thread:", kernel.name);
        for (int64_t m : {8, 64, 256}) {
          const double time = seconds({&kernel, isa, shape, 1, m}, data, 1);
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

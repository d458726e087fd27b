// How close the routed-experts op comes to the machine: bytes of distinct experts per second as a
// fraction of the read ceiling measured beside it, and what a call costs that has nothing to do.
//   experts_bench [threads=all] [intermediate=768] [hidden=2048] [experts=128] [per token=8]
//                 [tokens=1] [format=fp8_block]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/read_bandwidth.h"
#include "kernels/formats.h"
#include "moe/experts.h"
#include "runtime/cpu_runtime.h"
#include "runtime/host_store.h"

using namespace jaxmoe;

namespace {

constexpr int kRepeats = 9;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(EXIT_FAILURE);
}

}  // namespace

int main(int argc, char** argv) {
  auto number = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  const int threads = number(1, 0), f = number(2, 768), d = number(3, 2048);
  const int num_experts = number(4, 128), per_token = number(5, 8), tokens = number(6, 1);
  const std::string format_name = argc > 7 ? argv[7] : "fp8_block";
  int code = 0;
  while (code < kNumFormats && format_name != kFormatInfo[code].name) ++code;
  if (code == kNumFormats) {
    std::fprintf(stderr, "no format is called %s\n", format_name.c_str());
    return EXIT_FAILURE;
  }
  const WeightFormat format = static_cast<WeightFormat>(code);
  const FormatInfo& info = format_info(format);

  RuntimeOptions options;
  options.num_threads = threads;
  std::shared_ptr<CpuRuntime> runtime;
  require(CpuRuntime::create(options, &runtime));
  std::shared_ptr<HostStore> store;
  require(HostStore::create(runtime->topology(), {{num_experts, f, d, format}}, Backing::kArena,
                            &store));
  std::mt19937 random(1);
  for (int e = 0; e < num_experts; ++e) {
    for (int m = 0; m < kNumMatrices; ++m) {
      const Matrix which = static_cast<Matrix>(m);
      for (int node = 0; node < store->num_nodes(); ++node) {
        auto [begin, end] = node_rows(store->rows(0, which), node, store->num_nodes());
        uint8_t* data = store->segment(0, e, which, node);
        const int64_t bytes = (end - begin) * store->row_bytes(0, which);
        // FP8: no NaN, nothing large. Floats: magnitudes near 1/64, as products of subnormals are
        // slow.
        for (int64_t i = 0; i < bytes; ++i) {
          const uint8_t random_byte = static_cast<uint8_t>(random());
          const bool top = info.bits > 8 && i % (info.bits / 8) == info.bits / 8 - 1;
          data[i] = info.bits == 4   ? random_byte
                    : info.bits == 8 ? random_byte & 0xBF
                    : top            ? (random_byte & 0x80) | 0x3C
                                     : random_byte;
        }
      }
      require(store->mark_loaded(0, e, which));
      if (info.scaled()) {
        auto [rows, cols] = store->scale_shape(0, which);
        const size_t count = static_cast<size_t>(rows * cols);
        const std::vector<float> factors(count, 0.01f);
        const std::vector<uint16_t> halves(count, float_to_bf16(0.01f));
        const std::vector<uint8_t> powers(count, 120);
        const void* scale =
            info.scale_type == ScaleType::kF32    ? static_cast<const void*>(factors.data())
            : info.scale_type == ScaleType::kBf16 ? static_cast<const void*>(halves.data())
                                                  : powers.data();
        require(store->set_scale(0, e, which, info.scale_type, scale, rows, cols));
      }
    }
  }

  std::vector<uint16_t> x(static_cast<size_t>(tokens * d), float_to_bf16(0.01f));
  std::vector<float> y(x.size()), weights(static_cast<size_t>(tokens * per_token), 0.1f);
  std::vector<int32_t> ids(weights.size());
  ExpertsCall call;
  call.x = x.data();
  call.num_tokens = tokens;
  call.per_token = per_token;
  call.expert_ids = ids.data();
  call.weights = weights.data();
  call.y = y.data();

  // Every call meets experts that left the caches: calls walk through a permutation of them all.
  std::vector<int32_t> order(static_cast<size_t>(num_experts));
  std::iota(order.begin(), order.end(), 0);
  const int calls = std::max(1, num_experts / per_token);
  std::vector<int> cpus;
  for (const Placement& p : place_threads(runtime->topology(), runtime->num_threads())) {
    cpus.push_back(p.cpu);
  }
  std::vector<double> rates, ceilings, call_us;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    uint64_t bytes_before = runtime->stats().experts_weight_bytes.load();
    double spent = 0;
    for (int c = 0; c < calls; ++c) {
      for (int t = 0; t < tokens; ++t) {
        if (t > 0 || c == 0) std::shuffle(order.begin(), order.end(), random);
        const int first = t == 0 ? c * per_token : 0;
        for (int a = 0; a < per_token; ++a) {
          ids[static_cast<size_t>(t * per_token + a)] =
              order[static_cast<size_t>((first + a) % num_experts)];
        }
      }
      const double begin = seconds();
      require(experts(*runtime, *store, call));
      spent += seconds() - begin;
    }
    rates.push_back(
        static_cast<double>(runtime->stats().experts_weight_bytes.load() - bytes_before) / spent /
        1e9);
    call_us.push_back(spent / calls * 1e6);
    for (double ceiling : read_bandwidth(cpus, int64_t{1} << 30, 1))
      ceilings.push_back(ceiling / 1e9);
  }
  std::fill(ids.begin(), ids.end(), -1);
  std::vector<double> empty;
  for (int i = 0; i < 10000; ++i) {
    const double begin = seconds();
    require(experts(*runtime, *store, call));
    empty.push_back((seconds() - begin) * 1e6);
  }
  std::printf(
      "%s %s %dx%d, %d of %d experts, %d tokens, %d threads: %.1f us a call, %.2f GB/s = %.2f of "
      "the "
      "ceiling %.2f GB/s (best against best %.2f); empty call %.2f us\n",
      isa_name(runtime->isa()), info.name, f, d, per_token, num_experts, tokens,
      runtime->num_threads(), median(call_us), median(rates), median(rates) / median(ceilings),
      median(ceilings),
      *std::max_element(rates.begin(), rates.end()) /
          *std::max_element(ceilings.begin(), ceilings.end()),
      median(empty));
  return EXIT_SUCCESS;
}

// The tables: complete, honest about which form they hold, and chosen as this machine allows.
#include <thread>

#include "check.h"
#include "kernels_fixture.h"

using namespace jaxmoe_test;

JAXMOE_TEST(tables_are_complete_and_never_above_their_isa) {
  for (int i = 0; i < kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_supported(isa)) continue;
    const KernelTable& table = kernel_table(isa);
    JAXMOE_CHECK(table.isa == isa);
    for (const auto& family : table.matmul) {
      for (const MatmulKernel& kernel : family) {
        JAXMOE_CHECK(kernel.name != nullptr && kernel.matmul != nullptr &&
                     kernel.prepare != nullptr);
        JAXMOE_CHECK(kernel.prepared_row_bytes != nullptr &&
                     kernel.prepared_row_bytes(1) % 64 == 0);
        JAXMOE_CHECK(kernel.isa <= isa, "%s in %s", kernel.name, isa_name(isa));
        JAXMOE_CHECK((kernel.panel_bytes == nullptr) == (kernel.make_panel == nullptr));
        std::printf("  %-12s %s\n", isa_name(isa), kernel.name);
      }
    }
  }
}

JAXMOE_TEST(best_isa_is_supported_and_explained) {
  JAXMOE_CHECK(isa_supported(Isa::kScalar) && isa_supported(best_isa()));
  JAXMOE_CHECK(std::strstr(isa_reason(), isa_name(best_isa())) == isa_reason(), "%s", isa_reason());
  for (int i = static_cast<int>(best_isa()) + 1; i < kNumIsas; ++i) {
    JAXMOE_CHECK(!isa_supported(static_cast<Isa>(i)));
  }
  std::printf("  %s\n", isa_reason());
}

JAXMOE_TEST(f32_activations_select_the_vector_kernel) {
  const KernelTable& table = kernel_table(best_isa());
  for (WeightFormat format : kFormats) {
    const int f = static_cast<int>(format);
    JAXMOE_CHECK(&select_kernel(table, Family::kMatrix, format, ActivationType::kF32) ==
                 &table.matmul[static_cast<int>(Family::kVector)][f]);
    JAXMOE_CHECK(&select_kernel(table, Family::kMatrix, format, ActivationType::kBf16) ==
                 &table.matmul[static_cast<int>(Family::kMatrix)][f]);
  }
}

// How memory is read never enters a result.
JAXMOE_TEST(reading_one_stream_gives_the_same_bits) {
  for (int i = 0; i < kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_supported(isa)) continue;
    kernel_thread_init(isa);
    const KernelTable one = isa_tables::make_table(isa, {.one_stream = true});
    const KernelTable several = isa_tables::make_table(isa, {.one_stream = false});
    for (Family family : kFamilies) {
      for (WeightFormat format : kFormats) {
        const auto entry = [&](const KernelTable& table) -> const MatmulKernel& {
          return table.matmul[static_cast<int>(family)][static_cast<int>(format)];
        };
        const int64_t k = padded_columns(format, 1100);
        Weights weights(format, 150, k);
        weights.randomize(3);
        for (int64_t m : {1, 2, 3, 4, 5, 8, 100}) {
          Activations x(m, k);
          const auto want = run(entry(several), weights.view(), 0, 150, x, iota(m));
          JAXMOE_CHECK(run(entry(one), weights.view(), 0, 150, x, iota(m)) == want, "%s m %d",
                       entry(one).name, static_cast<int>(m));
        }
      }
    }
    kernel_thread_release(isa);
  }
}

// Threads initialise, compute and release on their own, all at once, and agree bit for bit.
JAXMOE_TEST(threads_agree) {
  for_each_kernel([](const MatmulKernel& kernel, Family, WeightFormat format) {
    const int64_t k = padded_columns(format, 300);
    Weights weights(format, 40, k);
    weights.randomize(5);
    Activations x(4, k);
    const std::vector<float> want = run(kernel, weights.view(), 0, 40, x, iota(4));
    std::vector<std::vector<float>> got(3);
    std::vector<std::thread> threads;
    for (auto& y : got) {
      threads.emplace_back([&] {
        for (int round = 0; round < 2; ++round) {
          kernel_thread_init(kernel.isa);
          y = run(kernel, weights.view(), 0, 40, x, iota(4));
          kernel_thread_release(kernel.isa);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const auto& y : got) JAXMOE_CHECK(y == want, "%s", kernel.name);
  });
}

JAXMOE_TEST_MAIN

// Error bound over shapes with every kind of tail, batch invariance, gathers and views.
#include "check.h"
#include "kernels_fixture.h"

using namespace jaxmoe_test;

namespace {

constexpr double kEps = 0x1p-24;

// |err| <= c eps sum |w||x|. An FP32 sum of k terms over eight or more lanes errs by at most (k/8 +
// a few) roundings in the worst case, by about its square root in practice; c follows the latter.
double bound_factor(int64_t k) { return 4.0 + 2.0 * std::sqrt(static_cast<double>(k)); }

// A problem with its oracle: sums and sums of magnitudes of every output, in double.
struct Problem {
  Weights weights;
  Activations x;
  std::vector<double> want, magnitude;  // [x.rows, n]

  Problem(Weights w, Activations activations)
      : weights(std::move(w)),
        x(std::move(activations)),
        want(x.rows * weights.n),
        magnitude(want) {
    for (int64_t n = 0; n < weights.n; ++n) {
      for (int64_t col = 0; col < weights.k; ++col) {
        const double weight = weights.value(n, col);
        for (int64_t row = 0; row < x.rows; ++row) {
          const double product = weight * x.f32[row * x.ld + col];
          want[row * weights.n + n] += product;
          magnitude[row * weights.n + n] += std::fabs(product);
        }
      }
    }
  }

  void check(const MatmulKernel& kernel, const std::vector<int32_t>& row_ids, int64_t n_begin,
             int64_t n_end, ActivationType type) const {
    const std::vector<float> y = run(kernel, weights.view(), n_begin, n_end, x, row_ids, type);
    for (size_t i = 0; i < row_ids.size(); ++i) {
      for (int64_t n = n_begin; n < n_end; ++n) {
        const int64_t at = row_ids[i] * weights.n + n;
        const double got = y[i * (n_end - n_begin) + (n - n_begin)];
        const double bound = bound_factor(weights.k) * kEps * magnitude[at];
        JAXMOE_CHECK(std::fabs(got - want[at]) <= bound,
                     "%s k %d m %zu row %zu n %d of [%d, %d): got %.9g, want %.9g, bound %.3g",
                     kernel.name, static_cast<int>(weights.k), row_ids.size(), i,
                     static_cast<int>(n), static_cast<int>(n_begin), static_cast<int>(n_end), got,
                     want[at], bound);
      }
    }
  }
};

Weights random_weights(WeightFormat format, int64_t n, int64_t k, int64_t pad_bytes,
                       uint64_t seed) {
  Weights weights(format, n, k, pad_bytes);
  weights.randomize(seed);
  return weights;
}

}  // namespace

JAXMOE_TEST(error_bound_over_tails) {
  const struct {
    int64_t k, n;
    std::vector<int64_t> ms;
  } shapes[] = {
      {1, 7, {0, 1, 2, 3, 5, 8, 17, 64}},
      {31, 16, {1, 2, 3, 17}},
      {127, 130, {1, 2, 5, 17}},
      {128, 1, {0, 1, 2, 3, 5, 8, 17, 64}},
      {129, 16, {1, 2, 8, 33}},
      {129, 130, {1, 64}},
      {300, 70, {1, 49, 97}},
      {576, 130, {1, 2, 3, 5, 8}},
      {2880, 16, {1, 2, 3, 17}},
      {7168, 7, {1, 2, 8}},
      {7168, 16, {17}},
  };
  for (const auto& shape : shapes) {
    std::vector<Problem> problems;
    for (WeightFormat format : kFormats) {
      const int64_t k = padded_columns(format, shape.k);
      problems.emplace_back(random_weights(format, shape.n, k, 0, k),
                            Activations(shape.ms.back(), k));
    }
    std::printf("  k %d n %d:", static_cast<int>(shape.k), static_cast<int>(shape.n));
    for_each_kernel([&](const MatmulKernel& kernel, Family, WeightFormat format) {
      for (int64_t m : shape.ms) {
        problems[static_cast<int>(format)].check(kernel, iota(m), 0, shape.n,
                                                 ActivationType::kBf16);
      }
    });
  }
}

JAXMOE_TEST(f32_activations_and_gathers_and_strides) {
  // 5 or 6 bytes between rows: rows at odd addresses; activations with a leading dimension of their
  // own.
  std::vector<Problem> problems;
  for (WeightFormat format : kFormats) {
    const int64_t k = padded_columns(format, 200);
    problems.emplace_back(random_weights(format, 150, k, format_info(format).bits <= 8 ? 5 : 6, 9),
                          Activations(9, k, 5, 3));
  }
  for_each_kernel([&](const MatmulKernel& kernel, Family, WeightFormat format) {
    const Problem& problem = problems[static_cast<int>(format)];
    for (ActivationType type : {ActivationType::kF32, ActivationType::kBf16}) {
      problem.check(kernel, {4}, 0, 150, type);
      problem.check(kernel, {8, 0}, 121, 139, type);
      problem.check(kernel, {7, 7, 1, 3, 0, 8}, 127, 150, type);
    }
  });
}

JAXMOE_TEST(row_ids_null_means_identity) {
  for_each_kernel([](const MatmulKernel& kernel, Family, WeightFormat format) {
    if (kernel.panel_bytes != nullptr) return;
    const int64_t k = padded_columns(format, 140);
    Weights weights(format, 20, k);
    weights.randomize(2);
    Activations x(5, k);
    const std::vector<float> want = run(kernel, weights.view(), 0, 20, x, iota(5));
    auto prepared = aligned_bytes(kernel.prepared_row_bytes(k) * 5);
    kernel.prepare(ActivationType::kBf16, x.bf16.data(), x.ld, k, 0, 5, prepared.get());
    std::vector<float> y(100);
    kernel.matmul(weights.view(), 0, 20, prepared.get(), nullptr, 5, y.data(), 20);
    JAXMOE_CHECK(std::memcmp(y.data(), want.data(), y.size() * 4) == 0, "%s", kernel.name);
  });
}

// y is written inside [m, n range] only, with any leading dimension; m = 0 and an empty n range
// write nothing.
JAXMOE_TEST(writes_only_its_outputs) {
  for_each_kernel([](const MatmulKernel& kernel, Family, WeightFormat format) {
    const int64_t k = padded_columns(format, 130);
    Weights weights(format, 40, k);
    weights.randomize(2);
    for (int64_t m : {0, 1, 2, 5, 17}) {
      Activations x(m, k);
      const std::vector<float> want = run(kernel, weights.view(), 3, 30, x, iota(m));
      auto prepared = aligned_bytes(kernel.prepared_row_bytes(k) * m + 64);
      kernel.prepare(ActivationType::kBf16, x.bf16.data(), x.ld, k, 0, m, prepared.get());
      const void* operand = prepared.get();
      auto panel = aligned_bytes(kernel.panel_bytes == nullptr ? 64 : kernel.panel_bytes(m, k));
      if (kernel.panel_bytes != nullptr) {
        kernel.make_panel(prepared.get(), k, nullptr, m, panel.get());
        operand = panel.get();
      }
      std::vector<float> y((m + 1) * 37, -7.0f);
      kernel.matmul(weights.view(), 3, 30, operand, nullptr, m, y.data(), 37);
      kernel.matmul(weights.view(), 5, 5, operand, nullptr, m, y.data(), 37);
      for (int64_t i = 0; i <= m; ++i) {
        for (int64_t n = 0; n < 37; ++n) {
          const float expected = i < m && n < 27 ? want[i * 27 + n] : -7.0f;
          JAXMOE_CHECK(y[i * 37 + n] == expected, "%s m %d at %d, %d", kernel.name,
                       static_cast<int>(m), static_cast<int>(i), static_cast<int>(n));
        }
      }
    }
  });
}

// The contract that makes a token's result independent of its company.
JAXMOE_TEST(batch_and_range_invariance_is_bitwise) {
  for_each_kernel([](const MatmulKernel& kernel, Family, WeightFormat format) {
    for (int64_t columns : {100, 577}) {
      const int64_t k = padded_columns(format, columns);
      constexpr int64_t kN = 150, kM = 70;
      Weights weights(format, kN, k);
      weights.randomize(11);
      Activations x(kM, k, 12);
      const std::vector<float> all = run(kernel, weights.view(), 0, kN, x, iota(kM));
      for (int64_t m : {1, 2, 3, 5, 17, 49}) {
        std::vector<int32_t> ids;
        for (int64_t i = 0; i < m; ++i) ids.push_back(static_cast<int32_t>((i * 31 + m) % kM));
        for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, kN}, {1, 2}, {37, 140}}) {
          const std::vector<float> part = run(kernel, weights.view(), begin, end, x, ids);
          for (int64_t i = 0; i < m; ++i) {
            const bool equal = std::memcmp(&part[i * (end - begin)], &all[ids[i] * kN + begin],
                                           (end - begin) * sizeof(float)) == 0;
            JAXMOE_CHECK(equal, "%s k %d m %d row %d range [%d, %d)", kernel.name,
                         static_cast<int>(k), static_cast<int>(m), static_cast<int>(i),
                         static_cast<int>(begin), static_cast<int>(end));
          }
        }
      }
    }
  });
}

JAXMOE_TEST_MAIN

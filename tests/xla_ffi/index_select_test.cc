// The choice of positions against sums in double, and against itself: any packing and any threads
// choose the same.
#include "attention/index_select.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>

#include "native_testing.h"
#include "runtime/bf16.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

constexpr int64_t kHeads = 6, kDim = 64, kPage = 16, kTopK = 40;

// Cached keys of some rows; what lies behind a row's end is NaN.
struct Keys {
  int64_t num_pages, pages_per_row = 0;
  std::vector<int32_t> tables;
  std::vector<float> values;
  std::vector<uint16_t> halves;

  explicit Keys(const std::vector<int64_t>& lengths) {
    Random random(7);
    for (int64_t n : lengths) pages_per_row = std::max(pages_per_row, (n + kPage - 1) / kPage);
    num_pages = pages_per_row * static_cast<int64_t>(lengths.size());
    tables.resize(static_cast<size_t>(num_pages));
    std::iota(tables.rbegin(), tables.rend(), 0);
    values.assign(static_cast<size_t>(num_pages * kPage * kDim), NAN);
    for (size_t row = 0; row < lengths.size(); ++row) {
      for (int64_t p = 0; p < lengths[row]; ++p) {
        float* key = values.data() + slot(static_cast<int64_t>(row), p) * kDim;
        for (int64_t i = 0; i < kDim; ++i) key[i] = bf16_to_float(float_to_bf16(random.value()));
      }
    }
    halves.resize(values.size());
    round_to_bf16(values.data(), static_cast<int64_t>(values.size()), halves.data());
  }
  int64_t slot(int64_t row, int64_t position) const {
    return tables[static_cast<size_t>(row * pages_per_row + position / kPage)] * kPage +
           position % kPage;
  }
};

struct Token {
  int32_t row, position;
};

struct Step {
  std::vector<int32_t> rows, positions;
  std::vector<float> q, weights;
  std::vector<uint16_t> q_halves;

  explicit Step(const std::vector<Token>& tokens) {
    for (const Token& token : tokens) {
      rows.push_back(token.row);
      positions.push_back(token.position);
      // Inputs depend on the token alone, so the same token is the same in any step.
      Random random(static_cast<uint64_t>(token.row * 100003 + token.position));
      for (int64_t i = 0; i < kHeads * kDim; ++i) {
        q.push_back(bf16_to_float(float_to_bf16(random.value())));
      }
      for (int64_t i = 0; i < kHeads; ++i) weights.push_back(random.value());
    }
    q_halves.resize(q.size());
    round_to_bf16(q.data(), static_cast<int64_t>(q.size()), q_halves.data());
  }
};

std::vector<int32_t> run(CpuRuntime& runtime, const Keys& keys, const Step& step, Family family,
                         std::string* message = nullptr) {
  std::vector<int32_t> out(step.rows.size() * kTopK, -7);
  IndexSelectCall call;
  call.family = family;
  call.q = step.q_halves.data();
  call.head_weights = step.weights.data();
  call.num_tokens = static_cast<int64_t>(step.rows.size());
  call.num_heads = kHeads;
  call.head_dim = kDim;
  call.keys = keys.halves.data();
  call.num_pages = keys.num_pages;
  call.page_size = kPage;
  call.token_rows = step.rows.data();
  call.positions = step.positions.data();
  call.block_tables = keys.tables.data();
  call.num_rows = keys.num_pages / keys.pages_per_row;
  call.pages_per_row = keys.pages_per_row;
  call.top_k = kTopK;
  call.out = out.data();
  const Status status = index_select(runtime, call);
  if (message != nullptr) {
    *message = status.message();
  } else {
    JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
  }
  return out;
}

double score(const Keys& keys, const Step& step, size_t t, int64_t position) {
  const float* key = keys.values.data() + keys.slot(step.rows[t], position) * kDim;
  double sum = 0;
  for (int64_t h = 0; h < kHeads; ++h) {
    const float* q = step.q.data() + (static_cast<int64_t>(t) * kHeads + h) * kDim;
    double product = 0;
    for (int64_t i = 0; i < kDim; ++i) {
      product += static_cast<double>(q[i]) * static_cast<double>(key[i]);
    }
    const double weight = static_cast<double>(step.weights[t * kHeads + static_cast<size_t>(h)]);
    sum += weight * std::max(product, 0.0);
  }
  return sum;
}

void check_against_double(const Keys& keys, const Step& step, const std::vector<int32_t>& out) {
  for (size_t t = 0; t < step.rows.size(); ++t) {
    const int32_t* got = out.data() + t * kTopK;
    const int64_t seen = step.rows[t] < 0 ? 0 : step.positions[t] + int64_t{1};
    const int64_t count = std::min(seen, kTopK);
    double least = 1e300, most_left = -1e300;
    int64_t n = 0;
    for (int64_t p = 0; p < seen; ++p) {
      const double s = score(keys, step, t, p);
      if (n < count && got[n] == keys.slot(step.rows[t], p)) {
        least = std::min(least, s);
        ++n;
      } else {
        most_left = std::max(most_left, s);
      }
    }
    JAXMOE_CHECK(n == count, "token %zu: %ld of %ld slots are those of its row in order", t,
                 static_cast<long>(n), static_cast<long>(count));
    JAXMOE_CHECK(least >= most_left - 1e-3, "token %zu: %g was left for %g", t, most_left, least);
    for (int64_t i = count; i < kTopK; ++i) JAXMOE_CHECK(got[i] == -1);
  }
}

}  // namespace

JAXMOE_TEST(the_best_are_chosen_whatever_is_packed_and_shared) {
  const Keys keys({3000, 50, 12});
  std::vector<Token> tokens;
  for (int32_t p = 2990; p < 2999; ++p) tokens.push_back({0, p});
  for (int32_t p = 35; p < 50; ++p) tokens.push_back({1, p});
  tokens.push_back({-1, 0});
  tokens.push_back({2, 11});
  const Step step(tokens);
  for (const Family family : {Family::kVector, Family::kMatrix}) {
    std::vector<int32_t> want;
    for (const int threads : {1, 2, 5}) {
      auto runtime = make_runtime(threads, threads == 5 ? 2 : 0);
      const std::vector<int32_t> got = run(*runtime, keys, step, family);
      if (want.empty()) want = got;
      JAXMOE_CHECK(got == want);
      check_against_double(keys, step, got);
      for (size_t t = 0; t < tokens.size(); t += 4) {
        const std::vector<int32_t> alone = run(*runtime, keys, Step({tokens[t]}), family);
        JAXMOE_CHECK(std::equal(alone.begin(), alone.end(), want.begin() + t * kTopK));
      }
    }
  }
}

JAXMOE_TEST(nan_is_chosen_first) {
  Keys keys({100});
  keys.halves[static_cast<size_t>(keys.slot(0, 60) * kDim + 5)] = 0x7fc0;
  const std::vector<int32_t> got =
      run(*make_runtime(2), keys, Step({{0, 99}, {0, 50}}), Family::kVector);
  const auto has = [&](size_t t) {
    return std::count(got.begin() + t * kTopK, got.begin() + (t + 1) * kTopK, keys.slot(0, 60));
  };
  JAXMOE_CHECK(has(0) == 1);
  JAXMOE_CHECK(has(1) == 0);  // not seen yet
}

JAXMOE_TEST(bad_calls_say_what_is_wrong) {
  Keys keys({100, 100});
  auto runtime = make_runtime(1);
  std::string message;
  run(*runtime, keys, Step({{0, 5}, {2, 5}}), Family::kVector, &message);
  JAXMOE_CHECK(contains(message, "token 1 is at position 5 of row 2"));
  run(*runtime, keys, Step({{0, 112}}), Family::kVector, &message);
  JAXMOE_CHECK(contains(message, "token 0 is at position 112"));
  keys.tables[1] = 99;
  run(*runtime, keys, Step({{0, 20}, {0, 3}}), Family::kVector, &message);
  JAXMOE_CHECK(contains(message, "block_tables[0, 1] is 99"));
}

JAXMOE_TEST(several_callers_at_once) {
  const Keys keys({2000, 90});
  auto runtime = make_runtime(3);
  auto caller = [&](int32_t seed) {
    const Step step({{0, 1900 + seed}, {1, 80 + seed}});
    const std::vector<int32_t> want = run(*runtime, keys, step, Family::kVector);
    for (int i = 0; i < 20; ++i) JAXMOE_CHECK(run(*runtime, keys, step, Family::kVector) == want);
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(caller, i);
  for (std::thread& thread : threads) thread.join();
}

JAXMOE_TEST_MAIN

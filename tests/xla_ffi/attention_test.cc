// Paged attention against sums in double, and against itself: any packing and any threads give the
// same bits.
#include <cmath>
#include <cstring>
#include <thread>

#include "attention/attention_kernels.h"
#include "attention/paged_attention.h"
#include "native_testing.h"
#include "runtime/bf16.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

struct Shape {
  int64_t heads, kv_heads, head_dim, v_dim;
  bool separate_values;
  ActivationType cache_type;
  int64_t page_size;
};

struct Token {
  int32_t row, position;
};

// Cached keys and values of some rows, all positions random; what lies behind a row's end is NaN.
struct Cache {
  Shape shape;
  int64_t num_pages, pages_per_row;
  std::vector<int32_t> tables;
  std::vector<float> keys, values;
  std::vector<uint16_t> keys_half, values_half;

  Cache(const Shape& shape, const std::vector<int64_t>& lengths) : shape(shape) {
    Random random(static_cast<uint64_t>(shape.head_dim));
    pages_per_row = 0;
    for (int64_t n : lengths) {
      pages_per_row = std::max(pages_per_row, (n + shape.page_size - 1) / shape.page_size);
    }
    num_pages = pages_per_row * static_cast<int64_t>(lengths.size());
    for (int64_t p = 0; p < num_pages; ++p)
      tables.push_back(static_cast<int32_t>(num_pages - 1 - p));
    for (size_t i = tables.size() - 1; i > 0; --i) {
      std::swap(tables[i], tables[static_cast<size_t>(random.below(static_cast<int>(i)))]);
    }
    fill(lengths, shape.head_dim, random, &keys, &keys_half);
    if (shape.separate_values) fill(lengths, shape.v_dim, random, &values, &values_half);
  }
  void fill(const std::vector<int64_t>& lengths, int64_t dim, Random& random,
            std::vector<float>* out, std::vector<uint16_t>* halves) {
    const int64_t row = shape.kv_heads * dim;
    out->assign(static_cast<size_t>(num_pages * shape.page_size * row), NAN);
    for (size_t r = 0; r < lengths.size(); ++r) {
      for (int64_t p = 0; p < lengths[r]; ++p) {
        for (int64_t i = 0; i < row; ++i) {
          (*out)[static_cast<size_t>(slot(static_cast<int32_t>(r), p) * row + i)] =
              bf16_to_float(float_to_bf16(random.value()));
        }
      }
    }
    halves->resize(out->size());
    round_to_bf16(out->data(), static_cast<int64_t>(out->size()), halves->data());
  }
  int64_t slot(int32_t row, int64_t position) const {
    return tables[static_cast<size_t>(row * pages_per_row + position / shape.page_size)] *
               shape.page_size +
           position % shape.page_size;
  }
  const float* key(int32_t row, int64_t position, int64_t kv) const {
    return keys.data() + (slot(row, position) * shape.kv_heads + kv) * shape.head_dim;
  }
  const float* value(int32_t row, int64_t position, int64_t kv) const {
    if (!shape.separate_values) return key(row, position, kv);
    return values.data() + (slot(row, position) * shape.kv_heads + kv) * shape.v_dim;
  }
};

struct Step {
  std::vector<int32_t> rows, positions;
  std::vector<float> q;  // BF16 values, so that queries of both types are the same
  std::vector<uint16_t> q_halves;
  Family family = Family::kVector;
  int64_t window = 0;
  std::vector<float> sinks;

  Step(const Shape& shape, const std::vector<Token>& tokens, Family family = Family::kVector)
      : family(family) {
    for (const Token& token : tokens) {
      rows.push_back(token.row);
      positions.push_back(token.position);
      // A query depends on its token alone, so the same token is the same in any step.
      Random random(static_cast<uint64_t>(token.row * 100003 + token.position));
      for (int64_t i = 0; i < shape.heads * shape.head_dim; ++i)
        q.push_back(bf16_to_float(float_to_bf16(random.value())));
    }
    q_halves.resize(q.size());
    round_to_bf16(q.data(), static_cast<int64_t>(q.size()), q_halves.data());
  }
  PagedAttentionCall call(const Cache& cache, float* out) const {
    const Shape& s = cache.shape;
    const bool half = s.cache_type == ActivationType::kBf16;
    PagedAttentionCall call;
    call.family = family;
    call.q_type = in_halves(s) ? ActivationType::kBf16 : ActivationType::kF32;
    call.q = in_halves(s) ? static_cast<const void*>(q_halves.data()) : q.data();
    call.num_tokens = static_cast<int64_t>(rows.size());
    call.num_heads = s.heads;
    call.head_dim = s.head_dim;
    call.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
    call.cache_type = s.cache_type;
    call.keys = half ? static_cast<const void*>(cache.keys_half.data()) : cache.keys.data();
    if (s.separate_values) {
      call.values = half ? static_cast<const void*>(cache.values_half.data()) : cache.values.data();
    }
    call.num_pages = cache.num_pages;
    call.page_size = s.page_size;
    call.num_kv_heads = s.kv_heads;
    call.v_dim = s.v_dim;
    call.token_rows = rows.data();
    call.positions = positions.data();
    call.block_tables = cache.tables.data();
    call.pages_per_row = cache.pages_per_row;
    call.num_rows = static_cast<int64_t>(cache.tables.size()) / cache.pages_per_row;
    call.out = out;
    call.window = window;
    call.sinks = sinks.empty() ? nullptr : sinks.data();
    return call;
  }
  // Where products may be of BF16, the softmax weights are rounded too.
  bool in_halves(const Shape& s) const {
    return family == Family::kMatrix && s.cache_type == ActivationType::kBf16;
  }
  // As layers of gpt-oss have them: some sinks far above all scores, some far below.
  Step with(int64_t new_window, int64_t heads) const {
    Step step = *this;
    step.window = new_window;
    for (int64_t n = 0; n < heads; ++n) step.sinks.push_back(static_cast<float>(n % 5 - 2) * 4.0f);
    return step;
  }
};

std::vector<float> run(CpuRuntime& runtime, const Cache& cache, const Step& step) {
  std::vector<float> out(
      step.rows.size() * static_cast<size_t>(cache.shape.heads * cache.shape.v_dim), NAN);
  Status status = paged_attention(runtime, step.call(cache, out.data()));
  JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
  return out;
}

void check_against_double(const Cache& cache, const Step& step, const std::vector<float>& out) {
  const Shape& s = cache.shape;
  for (size_t t = 0; t < step.rows.size(); ++t) {
    for (int64_t n = 0; n < s.heads; ++n) {
      const float* got = out.data() + (static_cast<int64_t>(t) * s.heads + n) * s.v_dim;
      if (step.rows[t] < 0) {
        for (int64_t v = 0; v < s.v_dim; ++v) JAXMOE_CHECK(got[v] == 0);
        continue;
      }
      const int64_t kv = n / (s.heads / s.kv_heads);
      std::vector<double> scores, want(static_cast<size_t>(s.v_dim));
      std::vector<double> size(static_cast<size_t>(s.v_dim));
      double top = -1e300, sum = 0;
      const int64_t first =
          step.window == 0 ? 0 : std::max<int64_t>(0, step.positions[t] + 1 - step.window);
      for (int64_t p = first; p <= step.positions[t]; ++p) {
        const float* key = cache.key(step.rows[t], p, kv);
        const float* q = step.q.data() + (static_cast<int64_t>(t) * s.heads + n) * s.head_dim;
        double score = 0;
        for (int64_t h = 0; h < s.head_dim; ++h)
          score += static_cast<double>(q[h]) * static_cast<double>(key[h]);
        score /= std::sqrt(static_cast<double>(s.head_dim));
        scores.push_back(score);
        top = std::max(top, score);
      }
      for (size_t p = 0; p < scores.size(); ++p) {
        const double weight = std::exp(scores[p] - top);
        sum += weight;
        const float* value = cache.value(step.rows[t], first + static_cast<int64_t>(p), kv);
        for (int64_t v = 0; v < s.v_dim; ++v) {
          want[static_cast<size_t>(v)] += weight * static_cast<double>(value[v]);
          size[static_cast<size_t>(v)] += weight * std::abs(static_cast<double>(value[v]));
        }
      }
      if (!step.sinks.empty()) {
        sum += std::exp(static_cast<double>(step.sinks[static_cast<size_t>(n)]) - top);
      }
      for (int64_t v = 0; v < s.v_dim; ++v) {
        const double error =
            std::abs(static_cast<double>(got[v]) - want[static_cast<size_t>(v)] / sum);
        const double rounding = step.in_halves(s) ? 1.0 / 256 : 0;  // BF16: 2^-9 a weight, and room
        JAXMOE_CHECK(error <= 5e-6 + rounding * size[static_cast<size_t>(v)] / sum,
                     "token %zu head %d: %g", t, static_cast<int>(n), error);
      }
    }
  }
}

std::vector<Isa> isas() {
  std::vector<Isa> supported;
  for (int i = 0; i < kNumIsas; ++i) {
    if (isa_supported(static_cast<Isa>(i))) supported.push_back(static_cast<Isa>(i));
  }
  return supported;
}

const std::vector<Shape> kShapes = {
    {4, 4, 16, 16, true, ActivationType::kF32, 4},
    {6, 2, 37, 21, true, ActivationType::kBf16, 16},
    {40, 1, 40, 24, false, ActivationType::kBf16, 16},
    {3, 1, 64, 64, false, ActivationType::kF32, 7},
};

constexpr Family kFamilies[] = {Family::kVector, Family::kMatrix};

std::vector<Token> tokens_of(int32_t row, int32_t begin, int32_t end) {
  std::vector<Token> tokens;
  for (int32_t p = begin; p < end; ++p) tokens.push_back({row, p});
  return tokens;
}

}  // namespace

JAXMOE_TEST(attention_against_double) {
  for (const Shape& shape : kShapes) {
    const Cache cache(shape, {9, 530, 1});
    std::vector<Token> tokens = tokens_of(0, 2, 9);
    for (const Token& token : {Token{1, 529}, Token{-1, 0}, Token{2, 0}, Token{1, 100}}) {
      tokens.push_back(token);
    }
    for (Family family : kFamilies) {
      const Step step(shape, tokens, family);
      for (Isa isa : isas()) {
        auto runtime = make_runtime(2, 0, isa);
        check_against_double(cache, step, run(*runtime, cache, step));
      }
    }
  }
}

JAXMOE_TEST(windows_and_sinks) {
  for (const Shape& shape : kShapes) {
    const Cache cache(shape, {70, 1100});
    std::vector<Token> tokens = tokens_of(0, 20, 70);
    for (const Token& token : {Token{1, 1099}, Token{-1, 0}, Token{1, 511}, Token{1, 512}}) {
      tokens.push_back(token);
    }
    const size_t per_token = static_cast<size_t>(shape.heads * shape.v_dim);
    for (auto [family, window] : {std::pair{Family::kVector, 0},
                                  {Family::kVector, 1},
                                  {Family::kVector, 17},
                                  {Family::kVector, 128},
                                  {Family::kVector, 600},
                                  {Family::kMatrix, 0},
                                  {Family::kMatrix, 1},
                                  {Family::kMatrix, 17},
                                  {Family::kMatrix, 128},
                                  {Family::kMatrix, 600}}) {
      const Step step = Step(shape, tokens, family).with(window, shape.heads);
      for (Isa isa : isas()) {
        auto runtime = make_runtime(2, 0, isa);
        const std::vector<float> out = run(*runtime, cache, step);
        check_against_double(cache, step, out);
        for (size_t t : {size_t{0}, size_t{13}, size_t{50}, size_t{53}}) {
          const Step alone = Step(shape, {tokens[t]}, family).with(window, shape.heads);
          const std::vector<float> got = run(*runtime, cache, alone);
          JAXMOE_CHECK(std::memcmp(got.data(), out.data() + t * per_token, per_token * 4) == 0,
                       "window %d, token %zu", window, t);
        }
      }
    }
  }
}

JAXMOE_TEST(same_bits_in_any_packing_and_with_any_threads) {
  for (const Shape& shape : kShapes) {
    const Cache cache(shape, {1100, 40});
    std::vector<Token> all = tokens_of(0, 1090, 1100);
    for (const Token& token : tokens_of(1, 0, 40)) all.push_back(token);
    const size_t per_token = static_cast<size_t>(shape.heads * shape.v_dim);
    for (Family family : kFamilies) {
      for (Isa isa : isas()) {
        auto one = make_runtime(1, 0, isa);
        const std::vector<float> want = run(*one, cache, Step(shape, all, family));
        for (auto [threads, nodes] : {std::pair<int, int>{2, 0}, {5, 2}}) {
          auto runtime = make_runtime(threads, nodes, isa);
          const std::vector<float> got = run(*runtime, cache, Step(shape, all, family));
          JAXMOE_CHECK(std::memcmp(got.data(), want.data(), want.size() * 4) == 0);
          for (size_t t : {size_t{0}, size_t{9}, size_t{10}, size_t{31}, size_t{49}}) {
            const std::vector<float> alone = run(*runtime, cache, Step(shape, {all[t]}, family));
            JAXMOE_CHECK(std::memcmp(alone.data(), want.data() + t * per_token, per_token * 4) ==
                         0);
          }
          const std::vector<float> mixed =
              run(*runtime, cache, Step(shape, {all[12], {-1, 0}, all[11], all[3]}, family));
          JAXMOE_CHECK(std::memcmp(mixed.data(), want.data() + 12 * per_token, per_token * 4) == 0);
          JAXMOE_CHECK(std::memcmp(mixed.data() + 2 * per_token, want.data() + 11 * per_token,
                                   per_token * 4) == 0);
          JAXMOE_CHECK(std::memcmp(mixed.data() + 3 * per_token, want.data() + 3 * per_token,
                                   per_token * 4) == 0);
        }
      }
    }
  }
}

JAXMOE_TEST(chunk_borders_do_not_matter) {
  // A prompt in chunks of any sizes, as prefill cuts it, by each form.
  for (const Shape& shape : kShapes) {
    const Cache cache(shape, {300});
    const size_t per_token = static_cast<size_t>(shape.heads * shape.v_dim);
    for (Family family : kFamilies) {
      auto runtime = make_runtime(2);
      const std::vector<float> want =
          run(*runtime, cache, Step(shape, tokens_of(0, 0, 300), family));
      for (int32_t size : {64, 100}) {
        for (int32_t begin = 0; begin < 300; begin += size) {
          const std::vector<Token> chunk = tokens_of(0, begin, std::min(begin + size, 300));
          const std::vector<float> got = run(*runtime, cache, Step(shape, chunk, family));
          JAXMOE_CHECK(std::memcmp(got.data(), want.data() + static_cast<size_t>(begin) * per_token,
                                   got.size() * 4) == 0);
        }
      }
    }
  }
}

JAXMOE_TEST(what_a_token_does_not_see_does_not_matter) {
  // A later token's keys and values are NaN, in the block that earlier ones of the same step read.
  for (const Shape& shape : kShapes) {
    Cache cache(shape, {40});
    const size_t per_token = static_cast<size_t>(shape.heads * shape.v_dim);
    for (Family family : kFamilies) {
      for (Isa isa : isas()) {
        auto runtime = make_runtime(2, 0, isa);
        const Step step(shape, tokens_of(0, 0, 40), family);
        const Cache clean = cache;
        const std::vector<float> want = run(*runtime, clean, step);
        Cache broken = cache;
        const auto spoil = [&](int64_t dim, std::vector<float>* full, std::vector<uint16_t>* half) {
          if (full->empty()) return;
          const size_t at = static_cast<size_t>(broken.slot(0, 25) * shape.kv_heads * dim);
          for (size_t i = 0; i < static_cast<size_t>(shape.kv_heads * dim); ++i) {
            (*full)[at + i] = NAN;
            (*half)[at + i] = 0x7F80;  // infinity
          }
        };
        spoil(shape.head_dim, &broken.keys, &broken.keys_half);
        spoil(shape.v_dim, &broken.values, &broken.values_half);
        const std::vector<float> got = run(*runtime, broken, step);
        JAXMOE_CHECK(std::memcmp(got.data(), want.data(), 25 * per_token * 4) == 0);
        for (size_t i = 25 * per_token; i < got.size(); ++i) JAXMOE_CHECK(!std::isfinite(got[i]));
      }
    }
  }
}

JAXMOE_TEST(extreme_scores) {
  // A key a thousand times another: the softmax is one and zero, nothing overflows.
  Shape shape = {1, 1, 8, 8, false, ActivationType::kF32, 16};
  Cache cache(shape, {3});
  auto set = [&cache](int64_t position, float value) {
    for (int64_t h = 0; h < 8; ++h)
      cache.keys[static_cast<size_t>(cache.slot(0, position) * 8 + h)] = value;
  };
  set(0, -3000);
  set(1, 2000);
  set(2, 1999);
  Step step(shape, {{0, 2}});
  step.q.assign(8, 50.0f);
  auto runtime = make_runtime(1);
  for (float v : run(*runtime, cache, step)) JAXMOE_CHECK(v == 2000.0f);
  step.q.assign(8, -50.0f);
  for (float v : run(*runtime, cache, step)) JAXMOE_CHECK(v == -3000.0f);
  step.q[3] = NAN;
  for (float v : run(*runtime, cache, step)) JAXMOE_CHECK(std::isnan(v));
}

JAXMOE_TEST(kv_write_converts_and_skips) {
  for (ActivationType to : {ActivationType::kF32, ActivationType::kBf16}) {
    for (ActivationType from : {ActivationType::kF32, ActivationType::kBf16}) {
      const int64_t slots = 5, n = 6, tokens = 3;
      Random random(1);
      std::vector<float> values(static_cast<size_t>(tokens * n));
      for (float& v : values) v = random.value();
      std::vector<uint16_t> halves(values.size());
      round_to_bf16(values.data(), tokens * n, halves.data());
      std::vector<float> cache(static_cast<size_t>(slots * n), 7.0f);
      std::vector<uint16_t> cache_half(cache.size(), float_to_bf16(7.0f));
      const std::vector<int32_t> at = {3, -1, 0};
      KvWriteCall call;
      call.cache_type = to;
      call.cache =
          to == ActivationType::kF32 ? static_cast<void*>(cache.data()) : cache_half.data();
      call.num_slots = slots;
      call.type = from;
      call.rows =
          from == ActivationType::kF32 ? static_cast<const void*>(values.data()) : halves.data();
      call.num_tokens = tokens;
      call.row_elements = n;
      call.slots = at.data();
      JAXMOE_CHECK(kv_write(call).ok());
      for (int64_t s = 0; s < slots; ++s) {
        for (int64_t i = 0; i < n; ++i) {
          const size_t index = static_cast<size_t>(s * n + i);
          const float got =
              to == ActivationType::kF32 ? cache[index] : bf16_to_float(cache_half[index]);
          float want = 7.0f;
          if (s == 3 || s == 0) {
            const size_t source = static_cast<size_t>((s == 3 ? 0 : 2) * n + i);
            const bool rounded = to == ActivationType::kBf16 || from == ActivationType::kBf16;
            want = rounded ? bf16_to_float(halves[source]) : values[source];
          }
          JAXMOE_CHECK(got == want);
        }
      }
      const std::vector<int32_t> bad = {3, 5, 0};
      call.slots = bad.data();
      JAXMOE_CHECK(contains(kv_write(call).message(), "kv_slots[1] is 5"));
    }
  }
}

JAXMOE_TEST(steps_are_checked_before_memory_is_read) {
  const Shape shape = kShapes[0];
  const Cache cache(shape, {9, 5});
  auto runtime = make_runtime(2);
  auto message = [&](const std::vector<Token>& tokens, auto change) {
    const Step step(shape, tokens);
    std::vector<float> out(tokens.size() * static_cast<size_t>(shape.heads * shape.v_dim));
    PagedAttentionCall call = step.call(cache, out.data());
    std::vector<int32_t> tables = cache.tables;
    change(tables);
    call.block_tables = tables.data();
    return paged_attention(*runtime, call).message();
  };
  auto nothing = [](std::vector<int32_t>&) {};
  JAXMOE_CHECK(contains(message({{2, 0}}, nothing), "token_rows[0] is 2"));
  JAXMOE_CHECK(contains(message({{0, 0}, {-2, 0}}, nothing), "token_rows[1] is -2"));
  JAXMOE_CHECK(contains(message({{0, 12}}, nothing), "positions[0] is 12"));
  JAXMOE_CHECK(contains(message({{0, -1}}, nothing), "positions[0] is -1"));
  auto hole = [](std::vector<int32_t>& tables) { tables[2] = -1; };
  JAXMOE_CHECK(contains(message({{0, 8}, {0, 2}}, hole), "block_tables[0, 2] is -1"));
  JAXMOE_CHECK(message({{0, 7}, {1, 3}}, hole).empty());
  auto beyond = [](std::vector<int32_t>& tables) { tables[3] = 6; };
  JAXMOE_CHECK(contains(message({{0, 3}, {1, 1}}, beyond), "block_tables[1, 0] is 6"));
}

JAXMOE_TEST(several_callers_at_once) {
  const Cache cache(kShapes[2], {1100, 40});
  auto runtime = make_runtime(3);
  auto caller = [&](int32_t seed) {
    const Step step(kShapes[2], {{0, 1000 + seed}, {1, 10 + seed}});
    const std::vector<float> want = run(*runtime, cache, step);
    for (int i = 0; i < 20; ++i) {
      const std::vector<float> got = run(*runtime, cache, step);
      JAXMOE_CHECK(std::memcmp(got.data(), want.data(), want.size() * 4) == 0);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(caller, i);
  for (std::thread& thread : threads) thread.join();
}

JAXMOE_TEST_MAIN

// Linear attention against a recurrence in double, and against itself: any threads, nodes and cuts
// of a text give the same bits.
#include "attention/gated_delta.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "native_testing.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

constexpr int64_t kKeyHeads = 2, kValueHeads = 4, kKey = 32, kValue = 48, kWidth = 4, kSlots = 5;
constexpr int64_t kChannels = 2 * kKeyHeads * kKey + kValueHeads * kValue;

std::vector<float> random_values(uint64_t seed, int64_t count) {
  Random random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = random.value();
  return values;
}

// A text's inputs, and what every position must give, in double.
struct Text {
  int64_t length;
  std::vector<float> qkv, decay, rate;
  Text(uint64_t seed, int64_t length)
      : length(length),
        qkv(random_values(seed, length * kChannels)),
        decay(random_values(seed + 1, length * kValueHeads)),
        rate(random_values(seed + 2, length * kValueHeads)) {}
};

struct Weights {
  std::vector<float> conv = random_values(91, kWidth* kChannels);
  std::vector<float> a_log = random_values(92, kValueHeads);
  std::vector<float> dt_bias = random_values(93, kValueHeads);
};

std::vector<double> in_double(const Text& text, const Weights& w) {
  std::vector<double> out;
  std::vector<double> state(kValueHeads * kKey * kValue, 0.0);
  for (int64_t t = 0; t < text.length; ++t) {
    std::vector<double> x(kChannels);
    for (int64_t c = 0; c < kChannels; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t from = t - (kWidth - 1) + i;
        if (from >= 0) sum += double{text.qkv[from * kChannels + c]} * w.conv[i * kChannels + c];
      }
      x[c] = sum / (1 + std::exp(-sum));
    }
    auto unit = [&](double* v, double scale) {
      double sum = 0;
      for (int64_t i = 0; i < kKey; ++i) sum += v[i] * v[i];
      for (int64_t i = 0; i < kKey; ++i) v[i] *= scale / std::sqrt(sum + 1e-6);
    };
    for (int64_t h = 0; h < 2 * kKeyHeads; ++h) {
      unit(&x[h * kKey], h < kKeyHeads ? 1 / std::sqrt(double{kKey}) : 1);
    }
    for (int64_t h = 0; h < kValueHeads; ++h) {
      const int64_t i = t * kValueHeads + h, key_head = h / (kValueHeads / kKeyHeads);
      const double soft = std::log1p(std::exp(double{text.decay[i]} + w.dt_bias[h]));
      const double decay = std::exp(-std::exp(double{w.a_log[h]}) * soft);
      const double rate = 1 / (1 + std::exp(-double{text.rate[i]}));
      const double* q = &x[key_head * kKey];
      const double* k = q + kKeyHeads * kKey;
      const double* v = &x[2 * kKeyHeads * kKey + h * kValue];
      for (int64_t j = 0; j < kValue; ++j) {
        double* cell = &state[h * kKey * kValue + j];
        double predicted = 0, sum = 0;
        for (int64_t d = 0; d < kKey; ++d) {
          cell[d * kValue] *= decay;
          predicted += cell[d * kValue] * k[d];
        }
        for (int64_t d = 0; d < kKey; ++d) {
          cell[d * kValue] += k[d] * rate * (v[j] - predicted);
          sum += cell[d * kValue] * q[d];
        }
        out.push_back(sum);
      }
    }
  }
  return out;
}

// States, NaN where nobody wrote, and steps over them.
struct Machine {
  std::shared_ptr<CpuRuntime> runtime;
  Weights weights;
  std::vector<float> conv_state, delta_state;

  explicit Machine(std::shared_ptr<CpuRuntime> runtime)
      : runtime(std::move(runtime)),
        conv_state(kSlots * (kWidth - 1) * kChannels, NAN),
        delta_state(kSlots * kValueHeads * kKey * kValue, NAN) {}

  struct Part {
    const Text* text;
    int64_t begin, end;
    int32_t from, to;
  };
  Status step(const std::vector<Part>& parts, int64_t padding, std::vector<float>* out,
              std::vector<std::pair<int64_t, int32_t>> saves = {}) {
    std::vector<float> qkv, decay, rate;
    std::vector<int32_t> rows, positions, from, to;
    for (const Part& part : parts) {
      auto add = [&](std::vector<float>* to, const std::vector<float>& all, int64_t width) {
        to->insert(to->end(), all.begin() + part.begin * width, all.begin() + part.end * width);
      };
      add(&qkv, part.text->qkv, kChannels);
      add(&decay, part.text->decay, kValueHeads);
      add(&rate, part.text->rate, kValueHeads);
      for (int64_t p = part.begin; p < part.end; ++p) {
        rows.push_back(static_cast<int32_t>(from.size()));
        positions.push_back(static_cast<int32_t>(p));
      }
      from.push_back(part.from);
      to.push_back(part.to);
    }
    const size_t tokens = rows.size() + static_cast<size_t>(padding);
    rows.resize(tokens, -1);
    positions.resize(tokens, 0);
    qkv.resize(tokens * kChannels, NAN);
    decay.resize(tokens * kValueHeads, NAN);
    rate.resize(tokens * kValueHeads, NAN);
    std::vector<int32_t> kept(tokens, -1);
    for (auto [token, slot] : saves) kept[static_cast<size_t>(token)] = slot;
    out->assign(tokens * kValueHeads * kValue, NAN);
    GatedDeltaCall call;
    call.qkv = qkv.data();
    call.decay_input = decay.data();
    call.rate_input = rate.data();
    call.conv_weight = weights.conv.data();
    call.a_log = weights.a_log.data();
    call.dt_bias = weights.dt_bias.data();
    call.num_tokens = static_cast<int64_t>(tokens);
    call.num_key_heads = kKeyHeads;
    call.num_value_heads = kValueHeads;
    call.key_dim = kKey;
    call.value_dim = kValue;
    call.conv_width = kWidth;
    call.conv_state = conv_state.data();
    call.delta_state = delta_state.data();
    call.num_slots = kSlots;
    call.token_rows = rows.data();
    call.positions = positions.data();
    call.state_from = from.data();
    call.state_to = to.data();
    call.state_saves = kept.data();
    call.num_rows = static_cast<int64_t>(from.size());
    call.out = out->data();
    return gated_delta(*runtime, call);
  }
};

std::vector<Isa> isas() {
  std::vector<Isa> supported;
  for (int i = 0; i < kNumIsas; ++i) {
    if (isa_supported(static_cast<Isa>(i))) supported.push_back(static_cast<Isa>(i));
  }
  return supported;
}

bool same_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

}  // namespace

JAXMOE_TEST(agrees_with_sums_in_double) {
  const Text text(1, 60);
  for (Isa isa : isas()) {
    Machine machine(make_runtime(2, 0, isa));
    std::vector<float> out;
    Status status = machine.step({{&text, 0, 60, 3, 3}}, 2, &out);
    JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
    const std::vector<double> want = in_double(text, machine.weights);
    double worst = 0, size = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      worst = std::max(worst, std::fabs(want[i] - double{out[i]}));
      size = std::max(size, std::fabs(want[i]));
    }
    JAXMOE_CHECK(worst < 2e-6 * size, "%s: error %g of %g", isa_name(isa), worst, size);
    for (size_t i = want.size(); i < out.size(); ++i) JAXMOE_CHECK(out[i] == 0.0f);
  }
}

JAXMOE_TEST(same_bits_in_any_cut_on_any_threads) {
  const Text text(1, 40), other(7, 40);
  Machine whole(make_runtime(1));
  std::vector<float> want, out;
  JAXMOE_CHECK(whole.step({{&text, 0, 40, 0, 0}}, 0, &want).ok());
  const int64_t row = kValueHeads * kValue;
  const std::pair<int, int> pools[] = {{1, 0}, {2, 0}, {3, 0}, {4, 2}};
  for (auto [threads, nodes] : pools) {
    Machine machine(make_runtime(threads, nodes));
    int64_t begin = 0;
    for (int64_t end : {1, 2, 4, 5, 20, 39, 40}) {
      // The other text before or after it; its state moves to another slot and is kept once.
      const Machine::Part mine{&text, begin, end, 2, 2}, theirs{&other, begin, end, 1, 1};
      const bool first = end % 2 == 0;
      Status status = machine.step(first ? std::vector<Machine::Part>{mine, theirs}
                                         : std::vector<Machine::Part>{theirs, mine},
                                   end % 3, &out, {{first ? 0 : end - begin, 4}});
      JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
      const int64_t at = first ? 0 : end - begin;
      JAXMOE_CHECK(same_bits(out.data() + at * row, want.data() + begin * row, (end - begin) * row),
                   "%d threads, positions %d to %d", threads, static_cast<int>(begin),
                   static_cast<int>(end));
      begin = end;
    }
    const int64_t conv = (kWidth - 1) * kChannels, delta = kValueHeads * kKey * kValue;
    JAXMOE_CHECK(same_bits(machine.conv_state.data() + 2 * conv, whole.conv_state.data(), conv));
    JAXMOE_CHECK(
        same_bits(machine.delta_state.data() + 2 * delta, whole.delta_state.data(), delta));
    // From the state kept after position 39, which is the last step's first token of the text.
    JAXMOE_CHECK(
        same_bits(machine.delta_state.data() + 4 * delta, whole.delta_state.data(), delta));
  }
}

JAXMOE_TEST(what_cannot_be_is_refused) {
  const Text text(1, 4), other(7, 4);
  Machine machine(make_runtime(2));
  std::vector<float> out;
  struct Bad {
    std::vector<Machine::Part> parts;
    std::vector<std::pair<int64_t, int32_t>> saves;
    const char* words;
  };
  const Bad bads[] = {
      {{{&text, 0, 2, 0, 5}}, {}, "state_to"},
      {{{&text, 0, 2, -1, 0}}, {}, "state_from"},
      {{{&text, 0, 2, 0, 0}, {&other, 0, 2, 0, 0}}, {}, "nothing else"},
      {{{&text, 1, 2, 1, 0}, {&other, 0, 2, 1, 1}}, {}, "no other row"},
      {{{&text, 0, 2, 0, 0}}, {{1, 0}}, "nothing else"},
      {{{&text, 0, 2, 0, 0}}, {{1, 5}}, "state_saves"},
  };
  for (const Bad& bad : bads) {
    Status status = machine.step(bad.parts, 0, &out, bad.saves);
    JAXMOE_CHECK(!status.ok() && contains(status.message(), bad.words), "%s: %s", bad.words,
                 status.message().c_str());
  }
}

JAXMOE_TEST_MAIN

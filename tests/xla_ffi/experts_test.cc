// The routed experts and linear maps against sums in double, and against themselves: any threads,
// any nodes, any batch give the same bits; submitted jobs and synchronous ones may run at once.
#include "moe/experts.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <thread>

#include "moe/elementwise.h"
#include "moe/experts_queue.h"
#include "moe/linear.h"
#include "native_testing.h"
#include "runtime/bf16.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

struct Shape {
  int experts, f, d;
  WeightFormat format;
};

// One layer's weights: as bytes for any store, and as doubles.
struct Layer {
  Shape shape;
  std::vector<std::vector<uint8_t>> bytes[kNumMatrices];  // [expert]
  std::vector<std::vector<uint8_t>> scales[kNumMatrices];
  std::vector<std::vector<double>> values[kNumMatrices];

  int64_t rows(int m) const { return m == 2 ? shape.d : shape.f; }
  int64_t cols(int m) const { return m == 2 ? shape.f : shape.d; }

  explicit Layer(const Shape& shape) : shape(shape) {
    Random random(static_cast<uint64_t>(shape.f));
    for (int m = 0; m < kNumMatrices; ++m) {
      const int64_t n = rows(m), k = cols(m);
      const FormatInfo& info = format_info(shape.format);
      const auto [sn, sk] = scale_dims(shape.format, n, k);
      const int64_t scale_size = scale_bytes(info.scale_type);
      for (int e = 0; e < shape.experts; ++e) {
        std::vector<uint8_t> data(static_cast<size_t>(n * weight_row_bytes(shape.format, k)));
        std::vector<uint8_t> scale(static_cast<size_t>(sn * sk * scale_size));
        std::vector<double> dense(static_cast<size_t>(n * k)), factor(static_cast<size_t>(sn * sk));
        // Small ones keep the hidden activations of scaled formats moderate.
        for (size_t i = 0; i < factor.size(); ++i) {
          const float s = (0.25f + std::abs(random.value())) / (info.bits == 4 ? 4.0f : 64.0f);
          const uint16_t half = float_to_bf16(s);
          const uint8_t power = static_cast<uint8_t>(127 + std::ilogb(s));
          if (info.scale_type == ScaleType::kF32) {
            std::memcpy(&scale[4 * i], &s, 4);
            factor[i] = static_cast<double>(s);
          } else if (info.scale_type == ScaleType::kBf16) {
            std::memcpy(&scale[2 * i], &half, 2);
            factor[i] = static_cast<double>(bf16_to_float(half));
          } else if (info.scale_type == ScaleType::kF32Zero) {
            uint32_t word = static_cast<uint32_t>(half) << 16 | random.below(17);
            std::memcpy(&scale[4 * i], &word, 4);
            factor[i] = static_cast<double>(bf16_to_float(half));
          } else if (info.scale_type == ScaleType::kE4m3) {
            const int64_t col = static_cast<int64_t>(i) % sk;
            if (col < sk - info.tail_cols) {
              scale[i] = static_cast<uint8_t>(40 + random.below(40));  // 0.25 to 7
              factor[i] = static_cast<double>(fp8_e4m3_to_float(scale[i])) * 0.03125;
            } else if (col == sk - 1) {
              const float tail = 0.03125f;
              std::memcpy(&scale[i - 3], &tail, 4);
            }
          } else {
            scale[i] = power;
            factor[i] = static_cast<double>(e8m0_to_float(power));
          }
        }
        for (int64_t i = 0; i < n * k; ++i) {
          double& value = dense[static_cast<size_t>(i)];
          if (info.bits == 8) {
            uint8_t code = static_cast<uint8_t>(random.below(127) | random.below(2) << 7);
            data[static_cast<size_t>(i)] = code;
            value = static_cast<double>(fp8_e4m3_to_float(code));
          } else if (info.bits == 4) {
            const uint8_t code = static_cast<uint8_t>(random.below(16));
            data[static_cast<size_t>(i / 2)] |= static_cast<uint8_t>(code << i % 2 * 4);
            const size_t word = static_cast<size_t>(i / k * sk + i % k / info.group_cols);
            value = info.scale_type == ScaleType::kF32Zero ? code - (scale[4 * word] & 31)
                    : info.scale_type == ScaleType::kBf16
                        ? code - 8.0
                        : static_cast<double>(fp4_e2m1_to_float(code));
          } else if (shape.format == WeightFormat::kBf16) {
            uint16_t half = float_to_bf16(random.value());
            std::memcpy(&data[static_cast<size_t>(2 * i)], &half, 2);
            value = static_cast<double>(bf16_to_float(half));
          } else {
            float f = random.value();
            std::memcpy(&data[static_cast<size_t>(4 * i)], &f, 4);
            value = static_cast<double>(f);
          }
          if (info.scaled()) {
            const int64_t col = info.group_cols == 0 ? 0 : i % k / info.group_cols;
            value *= factor[static_cast<size_t>(i / k / info.group_rows * sk + col)];
          }
        }
        bytes[m].push_back(std::move(data));
        scales[m].push_back(std::move(scale));
        values[m].push_back(std::move(dense));
      }
    }
  }

  std::shared_ptr<HostStore> store(const Topology& topology) const {
    std::shared_ptr<HostStore> store;
    Status status = HostStore::create(topology, {{shape.experts, shape.f, shape.d, shape.format}},
                                      Backing::kArena, &store);
    JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
    for (int m = 0; m < kNumMatrices; ++m) {
      const Matrix which = static_cast<Matrix>(m);
      for (int e = 0; e < shape.experts; ++e) {
        const int64_t stride = store->row_bytes(0, which);
        for (int node = 0; node < store->num_nodes(); ++node) {
          auto [begin, end] = node_rows(rows(m), node, store->num_nodes());
          std::memcpy(store->segment(0, e, which, node),
                      bytes[m][static_cast<size_t>(e)].data() + begin * stride,
                      static_cast<size_t>((end - begin) * stride));
        }
        JAXMOE_CHECK(store->mark_loaded(0, e, which).ok());
        const FormatInfo& info = format_info(shape.format);
        if (info.scaled()) {
          auto [sn, sk] = store->scale_shape(0, which);
          status = store->set_scale(0, e, which, info.scale_type,
                                    scales[m][static_cast<size_t>(e)].data(), sn, sk);
          JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
        }
      }
    }
    return store;
  }
};

struct Input {
  int64_t tokens, per_token, d;
  std::vector<float> x;
  std::vector<uint16_t> x_half;
  std::vector<int32_t> ids;
  std::vector<float> weights;

  Input(int64_t tokens, int64_t per_token, const Shape& shape, uint64_t seed)
      : tokens(tokens), per_token(per_token), d(shape.d) {
    Random random(seed);
    x_half.resize(static_cast<size_t>(tokens * d));
    for (uint16_t& v : x_half) v = float_to_bf16(random.value());
    x.resize(x_half.size());
    widen_bf16(x_half.data(), tokens * d, x.data());
    for (int64_t i = 0; i < tokens * per_token; ++i) {
      ids.push_back(random.below(shape.experts + 1) - 1);
      weights.push_back(random.value());
    }
  }
  ExpertsCall call(ActivationType type, Family family, float* y) const {
    ExpertsCall call;
    call.family = family;
    call.x_type = type;
    call.x = type == ActivationType::kF32 ? static_cast<const void*>(x.data()) : x_half.data();
    call.num_tokens = tokens;
    call.per_token = per_token;
    call.expert_ids = ids.data();
    call.weights = weights.data();
    call.y = y;
    return call;
  }
};

// The definition, in double.
std::vector<double> oracle(const Layer& layer, const Input& in) {
  const int64_t f = layer.shape.f, d = layer.shape.d;
  std::vector<double> y(static_cast<size_t>(in.tokens * d));
  for (int64_t t = 0; t < in.tokens; ++t) {
    for (int64_t a = 0; a < in.per_token; ++a) {
      const int32_t e = in.ids[static_cast<size_t>(t * in.per_token + a)];
      if (e < 0) continue;
      auto dot = [&](int m, int64_t row, const auto* x) {
        const double* w = layer.values[m][static_cast<size_t>(e)].data() + row * layer.cols(m);
        double sum = 0;
        for (int64_t i = 0; i < layer.cols(m); ++i) sum += w[i] * static_cast<double>(x[i]);
        return sum;
      };
      std::vector<double> h(static_cast<size_t>(f));
      for (int64_t i = 0; i < f; ++i) {
        const double gate = dot(0, i, in.x.data() + t * d), up = dot(1, i, in.x.data() + t * d);
        h[static_cast<size_t>(i)] = gate / (1 + std::exp(-gate)) * up;
      }
      for (int64_t i = 0; i < d; ++i) {
        y[static_cast<size_t>(t * d + i)] +=
            static_cast<double>(in.weights[static_cast<size_t>(t * in.per_token + a)]) *
            dot(2, i, h.data());
      }
    }
  }
  return y;
}

double max_abs(const std::vector<double>& values) {
  double most = 0;
  for (double v : values) most = std::max(most, std::abs(v));
  return most;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<Isa> isas() {
  std::vector<Isa> supported;
  for (int i = 0; i < kNumIsas; ++i) {
    if (isa_supported(static_cast<Isa>(i))) supported.push_back(static_cast<Isa>(i));
  }
  return supported;
}

// A kernel that wants panels, as the tile kernels do, made of the scalar one: a panel is the rows
// it gathers.
const MatmulKernel& scalar_kernel(WeightFormat format) {
  return kernel_table(Isa::kScalar).matmul[0][static_cast<int>(format)];
}
template <WeightFormat kFormat>
MatmulKernel panel_kernel() {
  MatmulKernel kernel = scalar_kernel(kFormat);
  kernel.name = "panels";
  kernel.panel_bytes = [](int64_t m, int64_t k) {
    return static_cast<size_t>(m) * scalar_kernel(kFormat).prepared_row_bytes(k);
  };
  kernel.make_panel = [](const void* prepared, int64_t k, const int32_t* ids, int64_t m,
                         void* panel) {
    const size_t row = scalar_kernel(kFormat).prepared_row_bytes(k);
    for (int64_t i = 0; i < m; ++i) {
      std::memcpy(static_cast<char*>(panel) + static_cast<size_t>(i) * row,
                  static_cast<const char*>(prepared) + static_cast<size_t>(ids[i]) * row, row);
    }
  };
  kernel.matmul = [](const WeightView& w, int64_t n_begin, int64_t n_end, const void* x,
                     const int32_t*, int64_t m, float* y, int64_t ldy) {
    scalar_kernel(kFormat).matmul(w, n_begin, n_end, x, nullptr, m, y, ldy);
  };
  return kernel;
}

const std::vector<Shape> kShapes = {
    {1, 8, 16, WeightFormat::kBf16},          {5, 24, 40, WeightFormat::kF32},
    {6, 140, 200, WeightFormat::kFp8Block},   {3, 264, 130, WeightFormat::kBf16},
    {3, 140, 200, WeightFormat::kFp8Channel}, {3, 160, 96, WeightFormat::kInt4G32},
    {2, 128, 256, WeightFormat::kInt4G128},   {3, 224, 160, WeightFormat::kMxfp4},
    {3, 160, 96, WeightFormat::kUint4G32},    {2, 128, 256, WeightFormat::kUint4G128},
    {2, 144, 208, WeightFormat::kNvfp4},      {3, 64, 160, WeightFormat::kMxfp8}};

}  // namespace

JAXMOE_TEST(swiglu_is_accurate_everywhere) {
  std::vector<float> gate, up, h;
  for (float g = -120; g < 120; g += 0.037f) gate.push_back(g);
  for (float g : {0.0f, -0.0f, 1e-30f, 3e38f, -3e38f, -INFINITY, NAN}) gate.push_back(g);
  up.assign(gate.size(), 1.0f);
  h.resize(gate.size());
  swiglu(gate.data(), up.data(), static_cast<int64_t>(gate.size()), h.data());
  for (size_t i = 0; i + 2 < gate.size(); ++i) {
    const double g = static_cast<double>(gate[i]);
    const double want = g / (1 + std::exp(-g));
    JAXMOE_CHECK(std::abs(static_cast<double>(h[i]) - want) <= 6e-7 * std::abs(want) + 1e-35,
                 "silu(%g) = %g, wanted %g", g, static_cast<double>(h[i]), want);
  }
  JAXMOE_CHECK(std::isnan(h.back()));
}

JAXMOE_TEST(experts_against_double) {
  for (const Shape& shape : kShapes) {
    const Layer layer(shape);
    for (auto [tokens, per_token] : {std::pair<int, int>{1, 1}, {1, 8}, {7, 3}, {70, 2}}) {
      const Input in(tokens, per_token, shape, static_cast<uint64_t>(tokens));
      const std::vector<double> want = oracle(layer, in);
      for (Isa isa : isas()) {
        auto runtime = make_runtime(2, 0, isa);
        auto store = layer.store(runtime->topology());
        for (ActivationType type : {ActivationType::kF32, ActivationType::kBf16}) {
          for (Family family : {Family::kVector, Family::kMatrix}) {
            std::vector<float> y(want.size(), NAN);
            Status status = experts(*runtime, *store, in.call(type, family, y.data()));
            JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
            // Hidden activations rounded to BF16 between the stages.
            const bool halves =
                std::strstr(runtime->kernel(family, shape.format, type).name, "_f32") == nullptr;
            const double bound = (halves ? 1.0 / 128 : 2e-5) * max_abs(want) + 1e-30;
            double worst = 0;
            for (size_t i = 0; i < y.size(); ++i) {
              const double error = std::abs(static_cast<double>(y[i]) - want[i]);
              worst = error <= worst ? worst : error;  // NaN sticks
            }
            JAXMOE_CHECK(worst <= bound, "isa %s family %d: %g > %g", isa_name(isa),
                         static_cast<int>(family), worst, bound);
          }
        }
      }
    }
  }
}

JAXMOE_TEST(same_bits_for_any_threads_nodes_and_batch) {
  for (const Shape& shape : kShapes) {
    const Layer layer(shape);
    const Input in(33, 3, shape, 5);
    for (Family family : {Family::kVector, Family::kMatrix}) {
      std::vector<float> first;
      for (auto [threads, nodes] :
           {std::pair<int, int>{1, 0}, {2, 0}, {5, 0}, {2, 2}, {1, 2}, {4, 3}}) {
        auto runtime = make_runtime(threads, nodes);
        auto store = layer.store(runtime->topology());
        std::vector<float> y(static_cast<size_t>(in.tokens * in.d), NAN);
        JAXMOE_CHECK(
            experts(*runtime, *store, in.call(ActivationType::kBf16, family, y.data())).ok());
        if (first.empty()) first = y;
        JAXMOE_CHECK(same_bits(y, first), "%d threads, %d nodes", threads, nodes);
        // One token alone.
        for (int64_t t : {0, 17, 32}) {
          ExpertsCall call = in.call(ActivationType::kBf16, family, y.data());
          std::vector<float> one(static_cast<size_t>(in.d));
          call.x = in.x_half.data() + t * in.d;
          call.num_tokens = 1;
          call.expert_ids += t * in.per_token;
          call.weights += t * in.per_token;
          call.y = one.data();
          JAXMOE_CHECK(experts(*runtime, *store, call).ok());
          JAXMOE_CHECK(std::memcmp(one.data(), first.data() + t * in.d, one.size() * 4) == 0);
        }
      }
    }
  }
}

JAXMOE_TEST(kernels_with_panels_are_served) {
  const Shape shape = {6, 140, 200, WeightFormat::kFp8Block};
  const Layer layer(shape);
  for (int64_t tokens : {1, 40, 300}) {
    const Input in(tokens, 3, shape, 6);
    std::vector<float> plain(static_cast<size_t>(in.tokens * in.d)), panels = plain;
    auto runtime = make_runtime(3, 2, Isa::kScalar);
    auto store = layer.store(runtime->topology());
    JAXMOE_CHECK(
        experts(*runtime, *store, in.call(ActivationType::kBf16, Family::kMatrix, plain.data()))
            .ok());
    runtime->replace_kernel_for_tests(Family::kMatrix, WeightFormat::kFp8Block,
                                      panel_kernel<WeightFormat::kFp8Block>());
    JAXMOE_CHECK(
        experts(*runtime, *store, in.call(ActivationType::kBf16, Family::kMatrix, panels.data()))
            .ok());
    JAXMOE_CHECK(same_bits(plain, panels), "%d tokens", static_cast<int>(tokens));
  }
}

JAXMOE_TEST(ids_are_checked_and_calls_without_work_give_zeros) {
  const Shape shape = {5, 24, 40, WeightFormat::kF32};
  const Layer layer(shape);
  auto runtime = make_runtime(2);
  auto store = layer.store(runtime->topology());
  Input in(4, 2, shape, 7);
  std::vector<float> y(static_cast<size_t>(in.tokens * in.d), NAN);
  ExpertsCall call = in.call(ActivationType::kF32, Family::kVector, y.data());
  in.ids[5] = 5;
  Status status = experts(*runtime, *store, call);
  JAXMOE_CHECK(contains(status.message(), "expert_ids[2, 1] is 5"), "%s", status.message().c_str());
  in.ids.assign(in.ids.size(), -1);
  JAXMOE_CHECK(experts(*runtime, *store, call).ok());
  JAXMOE_CHECK(
      std::all_of(y.begin(), y.end(), [](float v) { return std::bit_cast<uint32_t>(v) == 0; }));
  call.num_tokens = 0;
  JAXMOE_CHECK(experts(*runtime, *store, call).ok());
}

JAXMOE_TEST(each_distinct_expert_counts_once) {
  const Shape shape = {6, 140, 200, WeightFormat::kFp8Block};
  const Layer layer(shape);
  auto runtime = make_runtime(2, 2);
  auto store = layer.store(runtime->topology());
  Input in(3, 2, shape, 8);
  in.ids = {4, 1, 1, 1, -1, 4};
  std::vector<float> y(static_cast<size_t>(in.tokens * in.d));
  JAXMOE_CHECK(
      experts(*runtime, *store, in.call(ActivationType::kBf16, Family::kVector, y.data())).ok());
  JAXMOE_CHECK(runtime->stats().experts_distinct.load() == 2);
  JAXMOE_CHECK(runtime->stats().experts_weight_bytes.load() == 2 * (3 * 140 * 200 + 3 * 4 * 4));
}

JAXMOE_TEST(submit_and_wait) {
  const Shape shape = {6, 140, 200, WeightFormat::kFp8Block};
  const Layer layer(shape);
  for (int threads : {1, 2, 3}) {
    auto runtime = make_runtime(threads, 2);
    auto store = layer.store(runtime->topology());
    const Input a(5, 3, shape, 1), b(1, 3, shape, 2);
    auto run = [&](const Input& in) {
      std::vector<float> y(static_cast<size_t>(in.tokens * in.d));
      JAXMOE_CHECK(
          experts(*runtime, *store, in.call(ActivationType::kBf16, Family::kVector, y.data()))
              .ok());
      return y;
    };
    const std::vector<float> want_a = run(a), want_b = run(b);
    ExpertsQueue queue(*runtime);
    for (int round = 0; round < 50; ++round) {
      int32_t ticket_a = -1, ticket_b = -1;
      {
        Input copy = a;  // gone before the work is done
        JAXMOE_CHECK(queue
                         .submit(store, copy.call(ActivationType::kBf16, Family::kVector, nullptr),
                                 &ticket_a)
                         .ok());
      }
      JAXMOE_CHECK(
          queue.submit(store, b.call(ActivationType::kBf16, Family::kVector, nullptr), &ticket_b)
              .ok());
      std::vector<float> y(want_b.size());
      JAXMOE_CHECK(queue.wait(ticket_b, 1, b.d, y.data()).ok());
      JAXMOE_CHECK(same_bits(y, want_b));
      JAXMOE_CHECK(!queue.wait(ticket_b, 1, b.d, y.data()).ok());
      y.resize(want_a.size());
      JAXMOE_CHECK(
          contains(queue.wait(ticket_a, 4, a.d, y.data()).message(), "[5, 200] was submitted"));
      JAXMOE_CHECK(queue.wait(ticket_a, 5, a.d, y.data()).ok());
      JAXMOE_CHECK(same_bits(y, want_a));
    }
    float y = 0;
    JAXMOE_CHECK(!queue.wait(-1, 1, 1, &y).ok() && !queue.wait(12345, 1, 1, &y).ok());
    int32_t ticket;
    for (int i = 0; i < ExpertsQueue::kMaxTickets; ++i) {
      JAXMOE_CHECK(
          queue.submit(store, b.call(ActivationType::kBf16, Family::kVector, nullptr), &ticket)
              .ok());
    }
    JAXMOE_CHECK(
        !queue.submit(store, b.call(ActivationType::kBf16, Family::kVector, nullptr), &ticket)
             .ok());
    // The queue ends with 16 jobs nobody waited for.
  }
}

JAXMOE_TEST(linear_against_double_and_in_any_batch) {
  for (int f = 0; f < kNumFormats; ++f) {
    const WeightFormat format = static_cast<WeightFormat>(f);
    const int64_t n = 260, k = columns_suit(format, 136) ? 136 : 256, groups = 2;
    // An expert's `down` serves as the weights; two experts as two heads.
    const Layer layer({2, static_cast<int>(k), static_cast<int>(n), format});
    std::vector<uint8_t> weights, scales;
    for (size_t g = 0; g < 2; ++g) {
      weights.insert(weights.end(), layer.bytes[2][g].begin(), layer.bytes[2][g].end());
      scales.insert(scales.end(), layer.scales[2][g].begin(), layer.scales[2][g].end());
    }
    for (int64_t m : {1, 5, 150}) {
      const Input in(m, 1, {1, 1, static_cast<int>(groups * k), format}, 3);
      for (Isa isa : isas()) {
        for (Family family : {Family::kVector, Family::kMatrix}) {
          std::vector<float> first;
          for (int threads : {1, 3}) {
            auto runtime = make_runtime(threads, 2, isa);
            if (threads == 3 && isa == Isa::kScalar && format == WeightFormat::kBf16) {
              runtime->replace_kernel_for_tests(Family::kMatrix, WeightFormat::kBf16,
                                                panel_kernel<WeightFormat::kBf16>());
            }
            LinearCall call;
            call.family = family;
            const auto [scale_rows, scale_cols] = scale_dims(format, n, k);
            const int64_t row_bytes = weight_row_bytes(format, k);
            call.weight = {weights.data(),
                           scales.empty() ? nullptr : scales.data(),
                           n,
                           k,
                           row_bytes,
                           scale_cols,
                           format};
            call.groups = groups;
            call.weight_group_bytes = n * row_bytes;
            call.scale_group_bytes =
                scale_rows * scale_cols * scale_bytes(format_info(format).scale_type);
            call.x = in.x_half.data();
            call.m = m;
            call.ldx = groups * k;
            call.ldy = groups * n;
            call.y_type = ActivationType::kF32;
            std::vector<float> y(static_cast<size_t>(m * groups * n), NAN);
            call.y = y.data();
            JAXMOE_CHECK(linear(*runtime, call).ok());
            if (first.empty()) first = y;
            JAXMOE_CHECK(same_bits(y, first));
            std::vector<uint16_t> halves(y.size());
            call.y_type = ActivationType::kBf16;
            call.y = halves.data();
            JAXMOE_CHECK(linear(*runtime, call).ok());
            for (size_t i = 0; i < y.size(); ++i) JAXMOE_CHECK(halves[i] == float_to_bf16(y[i]));
          }
          for (int64_t i = 0; i < m; ++i) {
            for (int64_t g = 0; g < groups; ++g) {
              for (int64_t r = 0; r < n; ++r) {
                double sum = 0, magnitude = 0;
                for (int64_t c = 0; c < k; ++c) {
                  const double product =
                      layer.values[2][static_cast<size_t>(g)][static_cast<size_t>(r * k + c)] *
                      static_cast<double>(in.x[static_cast<size_t>((i * groups + g) * k + c)]);
                  sum += product;
                  magnitude += std::abs(product);
                }
                const double got =
                    static_cast<double>(first[static_cast<size_t>((i * groups + g) * n + r)]);
                JAXMOE_CHECK(std::abs(got - sum) <= 1e-6 * magnitude + 1e-30, "format %d: %g, %g",
                             f, got, sum);
              }
            }
          }
        }
      }
    }
  }
}

JAXMOE_TEST(synchronous_and_submitted_jobs_at_once) {
  const Shape shape = {6, 140, 200, WeightFormat::kFp8Block};
  const Layer layer(shape);
  auto runtime = make_runtime(3, 2);
  auto store = layer.store(runtime->topology());
  ExpertsQueue queue(*runtime);
  auto caller = [&](int seed) {
    const Input in(1 + seed * 3, 2, shape, static_cast<uint64_t>(seed));
    const int64_t n = 260, k = 200;
    std::vector<float> want(static_cast<size_t>(in.tokens * in.d)), y = want;
    JAXMOE_CHECK(
        experts(*runtime, *store, in.call(ActivationType::kBf16, Family::kVector, want.data()))
            .ok());
    std::vector<uint16_t> weights(static_cast<size_t>(n * k), float_to_bf16(0.5f));
    std::vector<float> linear_y(static_cast<size_t>(in.tokens * n));
    for (int round = 0; round < 30; ++round) {
      int32_t ticket = -1;
      JAXMOE_CHECK(
          queue.submit(store, in.call(ActivationType::kBf16, Family::kVector, nullptr), &ticket)
              .ok());
      LinearCall call;
      call.weight = {
          reinterpret_cast<uint8_t*>(weights.data()), nullptr, n, k, 2 * k, 0, WeightFormat::kBf16};
      call.x = in.x_half.data();
      call.m = in.tokens;
      call.ldx = k;
      call.y = linear_y.data();
      call.y_type = ActivationType::kF32;
      call.ldy = n;
      JAXMOE_CHECK(linear(*runtime, call).ok());
      for (int64_t i = 0; i < in.tokens; ++i) {
        JAXMOE_CHECK(linear_y[static_cast<size_t>(i * n)] ==
                     linear_y[static_cast<size_t>(i * n + n - 1)]);
      }
      JAXMOE_CHECK(queue.wait(ticket, in.tokens, in.d, y.data()).ok());
      JAXMOE_CHECK(same_bits(y, want));
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(caller, i);
  for (std::thread& thread : callers) thread.join();
}

JAXMOE_TEST_MAIN

// The border of the experts op: whatever ids, weights and activations a caller gives, it gets a
// clear error or a defined result, and no token's values reach another's.
//
// Inputs are strings of bytes. The test makes some thousands from fixed seeds; built with
// -DJAXMOE_FUZZER (and -fsanitize=fuzzer) the same body is a libFuzzer target.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/formats.h"
#include "moe/experts.h"
#include "native_testing.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

constexpr int kExperts = 3, kIntermediate = 32, kHidden = 64;
constexpr WeightFormat kBorderFormats[] = {WeightFormat::kBf16, WeightFormat::kFp8Block,
                                           WeightFormat::kInt4G32, WeightFormat::kMxfp4};

// Bytes until there are none, then zeros.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  // Mostly ordinary numbers; else one of those that are not.
  float number() {
    static constexpr float kOdd[] = {0.0f,
                                     -0.0f,
                                     std::numeric_limits<float>::infinity(),
                                     -std::numeric_limits<float>::infinity(),
                                     std::numeric_limits<float>::quiet_NaN(),
                                     std::numeric_limits<float>::denorm_min(),
                                     -1e-39f,
                                     std::numeric_limits<float>::max(),
                                     -3e38f,
                                     1e-30f};
    const uint8_t kind = byte();
    if (kind >= 250) return kOdd[byte() % std::size(kOdd)];
    return (static_cast<float>(kind) - 125.0f) / 64.0f;
  }
  int32_t id() {
    const uint8_t kind = byte();
    if (kind >= 250) {
      return std::bit_cast<int32_t>(static_cast<uint32_t>(byte()) << 24 | byte());
    }
    return kind % (kExperts + 1) - 1;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

// The same runtimes and stores for all inputs; weights of every code but NaN.
struct World {
  std::shared_ptr<CpuRuntime> runtime = make_runtime(2, 2);
  std::vector<std::shared_ptr<HostStore>> stores;

  World() {
    Random random(1);
    for (WeightFormat format : kBorderFormats) {
      std::shared_ptr<HostStore> store;
      JAXMOE_CHECK(HostStore::create(runtime->topology(),
                                     {{kExperts, kIntermediate, kHidden, format}}, Backing::kArena,
                                     &store)
                       .ok());
      const FormatInfo& info = format_info(format);
      for (int e = 0; e < kExperts; ++e) {
        for (int m = 0; m < kNumMatrices; ++m) {
          const Matrix which = static_cast<Matrix>(m);
          for (int node = 0; node < store->num_nodes(); ++node) {
            auto [begin, end] = node_rows(store->rows(0, which), node, store->num_nodes());
            const int64_t bytes = (end - begin) * store->row_bytes(0, which);
            uint8_t* data = store->segment(0, e, which, node);
            for (int64_t i = 0; i < bytes; ++i) {
              const uint8_t byte = static_cast<uint8_t>(random.bits());
              data[i] = info.bits == 4 ? byte : byte & 0xBE;  // no NaN, in BF16 neither
            }
          }
          JAXMOE_CHECK(store->mark_loaded(0, e, which).ok());
          if (!info.scaled()) continue;
          auto [rows, cols] = store->scale_shape(0, which);
          std::vector<float> wide(static_cast<size_t>(rows * cols), 0.03f);
          std::vector<uint16_t> half(wide.size(), float_to_bf16(0.03f));
          std::vector<uint8_t> power(wide.size(), 122);
          const void* scale = info.scale_type == ScaleType::kF32 ? static_cast<void*>(wide.data())
                              : info.scale_type == ScaleType::kBf16
                                  ? static_cast<void*>(half.data())
                                  : power.data();
          JAXMOE_CHECK(store->set_scale(0, e, which, info.scale_type, scale, rows, cols).ok());
        }
      }
      stores.push_back(std::move(store));
    }
  }
};

World& world() {
  static World instance;
  return instance;
}

bool same_row(const float* a, const float* b) {
  for (int i = 0; i < kHidden; ++i) {
    const bool nan = std::isnan(a[i]) && std::isnan(b[i]);  // whose bits are nobody's business
    if (!nan && std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i])) return false;
  }
  return true;
}

struct Counts {
  int errors = 0, results = 0, odd = 0;
};

void run_input(const uint8_t* data, size_t size, Counts* counts) {
  Input in(data, size);
  CpuRuntime& runtime = *world().runtime;
  const HostStore& store = *world().stores[in.byte() % std::size(kBorderFormats)];
  const int64_t tokens = in.byte() % 7, per_token = in.byte() % 4;
  const uint8_t kinds = in.byte();
  ExpertsCall call;
  call.family = kinds & 1 ? Family::kMatrix : Family::kVector;
  call.x_type = kinds & 2 ? ActivationType::kF32 : ActivationType::kBf16;
  call.num_tokens = tokens;
  call.per_token = per_token;
  std::vector<int32_t> ids(static_cast<size_t>(tokens * per_token));
  std::vector<float> weights(ids.size()), x(static_cast<size_t>(tokens * kHidden));
  for (int32_t& id : ids) id = in.id();
  for (float& weight : weights) weight = in.number();
  for (float& value : x) value = in.number();
  std::vector<uint16_t> half(x.size());
  for (size_t i = 0; i < x.size(); ++i) half[i] = float_to_bf16(x[i]);
  std::vector<float> bias(kExperts * kIntermediate);
  if (kinds & 4) {
    for (float& value : bias) value = in.number();
    call.gate_bias = call.up_bias = bias.data();
  }
  if (kinds & 8) call.alpha = 1.702f, call.limit = 7.0f;
  const bool wide = call.x_type == ActivationType::kF32;
  const auto row = [&](int64_t t) -> const void* {
    return wide ? static_cast<const void*>(x.data() + t * kHidden) : half.data() + t * kHidden;
  };
  std::vector<float> y(x.size(), 7.0f);
  call.x = row(0);
  call.expert_ids = ids.data();
  call.weights = weights.data();
  call.y = y.data();
  const Status status = experts(runtime, store, call);

  const bool valid =
      std::all_of(ids.begin(), ids.end(), [](int32_t id) { return id >= -1 && id < kExperts; });
  JAXMOE_CHECK(status.ok() == valid, "%s", status.message().c_str());
  if (!valid) {
    ++counts->errors;
    JAXMOE_CHECK(contains(status.message(), "expert_ids["), "%s", status.message().c_str());
    return;
  }
  ++counts->results;
  for (int64_t t = 0; t < tokens; ++t) {
    ExpertsCall one = call;
    std::vector<float> alone(kHidden, 7.0f);
    one.num_tokens = 1;
    one.x = row(t);
    one.expert_ids += t * per_token;
    one.weights += t * per_token;
    one.y = alone.data();
    JAXMOE_CHECK(experts(runtime, store, one).ok());
    JAXMOE_CHECK(same_row(y.data() + t * kHidden, alone.data()), "token %d of %d",
                 static_cast<int>(t), static_cast<int>(tokens));
    counts->odd +=
        std::any_of(alone.begin(), alone.end(), [](float v) { return !std::isfinite(v); });
    const bool none = std::all_of(ids.begin() + t * per_token, ids.begin() + (t + 1) * per_token,
                                  [](int32_t id) { return id == -1; });
    if (none) {
      JAXMOE_CHECK(std::all_of(alone.begin(), alone.end(),
                               [](float v) { return std::bit_cast<uint32_t>(v) == 0; }));
    }
  }
}

}  // namespace

#ifdef JAXMOE_FUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Counts counts;
  run_input(data, size, &counts);
  if (failures() != 0) std::abort();
  return 0;
}
#else
JAXMOE_TEST(any_input_gives_a_result_of_its_own_or_an_error) {
  Counts counts;
  for (uint64_t seed = 0; seed < 1500; ++seed) {
    Random random(seed);
    std::vector<uint8_t> bytes(static_cast<size_t>(random.below(700)));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.bits());
    run_input(bytes.data(), bytes.size(), &counts);
  }
  std::printf("  %d errors, %d results, %d tokens with infinities or NaN\n", counts.errors,
              counts.results, counts.odd);
  JAXMOE_CHECK(counts.errors > 20 && counts.results > 500 && counts.odd > 100);
}

JAXMOE_TEST_MAIN
#endif

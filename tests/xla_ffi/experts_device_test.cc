// submit and wait in stream order, on the host's stand-in for a device: same bits as the experts in
// one call, whatever the delays, with many steps enqueued, several microbatches, two devices,
// failures, and an end in the middle.
#include "moe/experts_device.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <thread>

#include "moe/experts.h"
#include "native_testing.h"
#include "runtime/host_driver.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

constexpr int64_t kExperts = 5, kF = 24, kD = 40, kLayers = 2;
constexpr DeviceSignal kSignals[] = {DeviceSignal::kValues, DeviceSignal::kHostFunctions};

std::shared_ptr<HostStore> make_store(const CpuRuntime& runtime) {
  std::shared_ptr<HostStore> store;
  std::vector<ExpertLayerSpec> layers(kLayers, {kExperts, kF, kD, WeightFormat::kF32});
  Status status = HostStore::create(runtime.topology(), layers, Backing::kArena, &store);
  JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
  Random random(3);
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int e = 0; e < kExperts; ++e) {
      for (int m = 0; m < kNumMatrices; ++m) {
        const Matrix which = static_cast<Matrix>(m);
        const int64_t rows = m == 2 ? kD : kF, stride = store->row_bytes(layer, which);
        for (int node = 0; node < store->num_nodes(); ++node) {
          auto [begin, end] = node_rows(rows, node, store->num_nodes());
          char* segment = reinterpret_cast<char*>(store->segment(layer, e, which, node));
          for (int64_t i = 0; i < (end - begin) * stride / 4; ++i) {
            const float value = random.value();
            std::memcpy(segment + 4 * i, &value, 4);
          }
        }
        JAXMOE_CHECK(store->mark_loaded(layer, e, which).ok());
      }
    }
  }
  return store;
}

// What one call has on its device.
struct Operands {
  std::vector<float> x, weights, y;
  std::vector<int32_t> ids;
  int64_t tokens, per_token;

  Operands(int64_t tokens, int64_t per_token, uint64_t seed)
      : y(static_cast<size_t>(tokens * kD), -1.0f), tokens(tokens), per_token(per_token) {
    Random random(seed);
    for (int64_t i = 0; i < tokens * kD; ++i) x.push_back(random.value());
    for (int64_t i = 0; i < tokens * per_token; ++i) {
      ids.push_back(random.below(kExperts + 1) - 1);
      weights.push_back(random.value());
    }
  }
  ExpertsCall call(int layer) const {
    ExpertsCall call;
    call.layer = layer;
    call.x_type = ActivationType::kF32;
    call.x = x.data();
    call.num_tokens = tokens;
    call.per_token = per_token;
    call.expert_ids = ids.data();
    call.weights = weights.data();
    return call;
  }
  std::vector<float> wanted(CpuRuntime& runtime, const HostStore& store, ExpertsCall call) const {
    std::vector<float> result(y.size());
    call.y = result.data();
    Status status = experts(runtime, store, call);
    JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
    return result;
  }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// A device of the stand-in with a stream of "XLA's", and experts on it.
struct Bench {
  std::shared_ptr<CpuRuntime> runtime = make_runtime(2, 2);
  std::shared_ptr<HostStore> store = make_store(*runtime);
  std::vector<std::shared_ptr<HostDriver>> drivers;
  std::vector<DeviceStream> streams;
  std::unique_ptr<ExpertsDevice> experts;

  explicit Bench(DeviceSignal signal, double max_delay_s = 0, int num_devices = 1) {
    for (int i = 0; i < num_devices; ++i) {
      HostDriverOptions options;
      options.max_delay_s = max_delay_s;
      options.seed = static_cast<uint64_t>(i + 1);
      drivers.push_back(std::make_shared<HostDriver>(options));
      streams.emplace_back();
      JAXMOE_CHECK(drivers.back()->stream_create(&streams.back()).ok());
    }
    experts = std::make_unique<ExpertsDevice>(
        *runtime,
        [this](int ordinal, std::shared_ptr<DeviceDriver>* driver) {
          *driver = drivers.at(static_cast<size_t>(ordinal));
          return Status();
        },
        signal);
  }
  ~Bench() {
    experts.reset();
    for (size_t i = 0; i < drivers.size(); ++i) {
      (void)drivers[i]->stream_synchronize(streams[i]);
      JAXMOE_CHECK(drivers[i]->registered_bytes() == 0, "page-locked memory was not given back");
    }
  }
  DevicePlace place(int slot, int64_t run, int device = 0) const {
    return {device, slot, run, streams[static_cast<size_t>(device)]};
  }
  void synchronize(int device = 0) {
    Status status = drivers[static_cast<size_t>(device)]->stream_synchronize(
        streams[static_cast<size_t>(device)]);
    JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
  }
  void submit(const DevicePlace& place, const ExpertsCall& call) {
    Status status = experts->submit(place, store, call);
    JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
  }
  void wait(const DevicePlace& place, Operands* operands) {
    Status status = experts->wait(place, operands->tokens, kD, operands->y.data());
    JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
  }
};

// Steps of two microbatches, interleaved as decode/dual_batch.py does: each slot's wait comes after
// the other's submit.
void enqueue_steps(Bench* bench, int device, int first_run, std::vector<Operands>* operands) {
  for (size_t i = 0; i + 1 < operands->size(); i += 2) {
    const int64_t run = first_run + static_cast<int64_t>(i) / 4;
    const int layer = static_cast<int>(i / 2 % kLayers);
    Operands &a = (*operands)[i], &b = (*operands)[i + 1];
    bench->submit(bench->place(0, run, device), a.call(layer));
    bench->submit(bench->place(1, run, device), b.call(layer));
    bench->wait(bench->place(0, run, device), &a);
    bench->wait(bench->place(1, run, device), &b);
  }
}

std::vector<Operands> some_operands(int count, uint64_t seed) {
  std::vector<Operands> operands;
  for (int i = 0; i < count; ++i) {
    // Sizes go up and down, so that the staging grows under way.
    operands.emplace_back(1 + i * 7 % 19, 1 + i % 3, seed + static_cast<uint64_t>(i));
  }
  return operands;
}

void check_results(Bench* bench, const std::vector<Operands>& operands) {
  for (size_t i = 0; i < operands.size(); ++i) {
    const int layer = static_cast<int>(i / 2 % kLayers);
    JAXMOE_CHECK(same_bits(operands[i].y, operands[i].wanted(*bench->runtime, *bench->store,
                                                             operands[i].call(layer))),
                 "call %zu", i);
  }
}

}  // namespace

JAXMOE_TEST(many_steps_in_flight_give_the_bits_of_one_call) {
  for (DeviceSignal signal : kSignals) {
    for (double delay : {0.0, 2e-4}) {
      Bench bench(signal, delay);
      std::vector<Operands> operands = some_operands(80, 100);
      enqueue_steps(&bench, 0, 1, &operands);
      bench.synchronize();
      check_results(&bench, operands);
      JAXMOE_CHECK(bench.experts->take_error().ok());
      JAXMOE_CHECK(contains(bench.experts->describe(), device_signal_name(signal)));
    }
  }
}

JAXMOE_TEST(operands_in_one_piece_are_copied_in_one) {
  for (DeviceSignal signal : kSignals) {
    Bench bench(signal, 1e-4);
    std::vector<Operands> operands = some_operands(12, 150);
    std::vector<std::vector<uint32_t>> packed;
    for (const Operands& in : operands) {
      std::vector<uint32_t> words(in.x.size() + 2 * in.ids.size());
      std::memcpy(words.data(), in.x.data(), 4 * in.x.size());
      std::memcpy(words.data() + in.x.size(), in.ids.data(), 4 * in.ids.size());
      std::memcpy(words.data() + in.x.size() + in.ids.size(), in.weights.data(), 4 * in.ids.size());
      packed.push_back(std::move(words));
    }
    for (size_t i = 0; i < operands.size(); ++i) {
      ExpertsCall call = operands[i].call(0);
      const uint32_t* words = packed[i].data();
      call.x = words;
      call.expert_ids = reinterpret_cast<const int32_t*>(words + operands[i].x.size());
      call.weights = reinterpret_cast<const float*>(call.expert_ids + operands[i].ids.size());
      const DevicePlace place = bench.place(0, static_cast<int64_t>(i));
      bench.submit(place, call);
      bench.wait(place, &operands[i]);
    }
    bench.synchronize();
    for (const Operands& in : operands) {
      JAXMOE_CHECK(same_bits(in.y, in.wanted(*bench.runtime, *bench.store, in.call(0))));
    }
  }
}

JAXMOE_TEST(the_enqueuing_thread_never_waits_for_the_stream) {
  for (DeviceSignal signal : kSignals) {
    Bench bench(signal);
    std::atomic<bool> gate{false};
    JAXMOE_CHECK(bench.drivers[0]
                     ->launch_host_func(
                         bench.streams[0],
                         [](void* open) {
                           while (!static_cast<std::atomic<bool>*>(open)->load()) {
                             std::this_thread::yield();
                           }
                         },
                         &gate)
                     .ok());
    std::vector<Operands> operands = some_operands(40, 200);
    enqueue_steps(&bench, 0, 1, &operands);  // would hang here
    JAXMOE_CHECK(bench.experts->stats().calls == 0);
    gate.store(true);
    bench.synchronize();
    check_results(&bench, operands);
  }
}

JAXMOE_TEST(two_devices_at_once) {
  for (DeviceSignal signal : kSignals) {
    Bench bench(signal, 1e-4, 2);
    std::vector<Operands> operands[2] = {some_operands(40, 300), some_operands(40, 400)};
    std::vector<std::thread> threads;
    for (int device = 0; device < 2; ++device) {
      threads.emplace_back([&, device] {
        enqueue_steps(&bench, device, 1, &operands[device]);
        bench.synchronize(device);
      });
    }
    for (std::thread& thread : threads) thread.join();
    check_results(&bench, operands[0]);
    check_results(&bench, operands[1]);
  }
}

JAXMOE_TEST(an_end_in_the_middle_serves_what_was_enqueued) {
  for (DeviceSignal signal : kSignals) {
    Bench bench(signal, 1e-4);
    std::vector<Operands> operands = some_operands(40, 500);
    enqueue_steps(&bench, 0, 1, &operands);
    bench.experts.reset();
    bench.synchronize();
    check_results(&bench, operands);
  }
}

JAXMOE_TEST(what_fails_on_the_host_is_told_to_the_next_step) {
  for (DeviceSignal signal : kSignals) {
    Bench bench(signal);
    Operands bad(2, 2, 1), good(2, 2, 2);
    bad.ids[3] = kExperts;
    bench.submit(bench.place(0, 1), bad.call(0));
    bench.wait(bench.place(0, 1), &bad);
    bench.synchronize();
    for (float v : bad.y) JAXMOE_CHECK(std::isnan(v));
    Status status = bench.experts->submit(bench.place(0, 2), bench.store, good.call(0));
    JAXMOE_CHECK(contains(status.message(), "earlier step: expert_ids[1, 1] is 5"), "%s",
                 status.message().c_str());
    bench.submit(bench.place(0, 3), good.call(0));
    bench.wait(bench.place(0, 3), &good);
    bench.synchronize();
    JAXMOE_CHECK(same_bits(good.y, good.wanted(*bench.runtime, *bench.store, good.call(0))));
  }
}

JAXMOE_TEST(misuse_is_refused_when_it_is_enqueued) {
  for (DeviceSignal signal : kSignals) {
    Bench bench(signal);
    Operands a(3, 2, 1);
    auto wait = [&](const DevicePlace& place, int64_t tokens) {
      return bench.experts->wait(place, tokens, kD, a.y.data()).message();
    };
    JAXMOE_CHECK(contains(wait(bench.place(0, 1), 3), "has no submitted call"));
    bench.submit(bench.place(0, 1), a.call(0));
    JAXMOE_CHECK(contains(wait(bench.place(0, 2), 3), "used by another program"));
    JAXMOE_CHECK(contains(wait(bench.place(0, 1), 4), "[3, 40] was submitted to slot 0"));
    JAXMOE_CHECK(contains(wait(bench.place(ExpertsDevice::kMaxSlots, 1), 3), "wanted 0 to 7"));
    bench.wait(bench.place(0, 1), &a);
    JAXMOE_CHECK(contains(wait(bench.place(0, 1), 3), "has no submitted call"));
    bench.synchronize();
    JAXMOE_CHECK(same_bits(a.y, a.wanted(*bench.runtime, *bench.store, a.call(0))));
  }
}

JAXMOE_TEST(a_call_nobody_waited_for_does_not_spoil_the_next) {
  for (DeviceSignal signal : kSignals) {
    Bench bench(signal, 1e-4);
    std::vector<Operands> operands = some_operands(20, 600);
    for (size_t i = 0; i < operands.size(); ++i) {
      bench.submit(bench.place(0, static_cast<int64_t>(i)), operands[i].call(0));
      if (i % 2 == 1) bench.wait(bench.place(0, static_cast<int64_t>(i)), &operands[i]);
    }
    bench.synchronize();
    for (size_t i = 1; i < operands.size(); i += 2) {
      JAXMOE_CHECK(same_bits(
          operands[i].y, operands[i].wanted(*bench.runtime, *bench.store, operands[i].call(0))));
    }
  }
}

JAXMOE_TEST(failed_copies_hang_nothing) {
  for (DeviceSignal signal : kSignals) {
    Bench bench(signal, 1e-4);
    Operands a(3, 2, 1);
    bench.submit(bench.place(0, 1), a.call(0));
    bench.drivers[0]->fail_copy(1, true, "no more copies");
    JAXMOE_CHECK(contains(bench.experts->wait(bench.place(0, 1), 3, kD, a.y.data()).message(),
                          "no more copies"));
    // The stream fails in the middle of many calls, and works again later.
    std::vector<Operands> lost = some_operands(20, 700);
    bench.drivers[0]->fail_copy(5, false, "the bus fell off");
    enqueue_steps(&bench, 0, 2, &lost);
    Status status = bench.drivers[0]->stream_synchronize(bench.streams[0]);
    JAXMOE_CHECK(contains(status.message(), "the bus fell off"), "%s", status.message().c_str());
    if (signal == DeviceSignal::kHostFunctions) continue;  // its side stream has failed for good
    std::vector<Operands> operands = some_operands(20, 800);
    enqueue_steps(&bench, 0, 20, &operands);
    bench.synchronize();
    check_results(&bench, operands);
  }
  // The end while a stream has failed.
  for (DeviceSignal signal : kSignals) {
    Bench bench(signal);
    std::vector<Operands> lost = some_operands(20, 900);
    bench.drivers[0]->fail_copy(3, false, "the bus fell off");
    enqueue_steps(&bench, 0, 2, &lost);
    bench.experts.reset();
    JAXMOE_CHECK(!bench.drivers[0]->stream_synchronize(bench.streams[0]).ok());
  }
}

JAXMOE_TEST(biases_are_copied_once) {
  for (DeviceSignal signal : kSignals) {
    Bench bench(signal, 1e-4);
    Random random(9);
    std::vector<float> gate(kExperts * kF), up(gate.size());
    for (float& v : gate) v = 2 * random.value();
    for (float& v : up) v = 2 * random.value();
    std::vector<Operands> operands = some_operands(12, 1000);
    auto with_biases = [&](const Operands& in) {
      ExpertsCall call = in.call(1);
      call.gate_bias = gate.data();
      call.up_bias = up.data();
      call.alpha = 1.702f;
      call.limit = 3.0f;
      return call;
    };
    std::vector<std::vector<float>> wanted;
    for (const Operands& in : operands) {
      wanted.push_back(in.wanted(*bench.runtime, *bench.store, with_biases(in)));
    }
    for (size_t i = 0; i < operands.size(); ++i) {
      const DevicePlace place = bench.place(static_cast<int>(i % 3), static_cast<int64_t>(i));
      bench.submit(place, with_biases(operands[i]));
      bench.wait(place, &operands[i]);
      if (i == 0) {
        bench.synchronize();
        // Nothing reads the device's arrays again.
        std::fill(gate.begin(), gate.end(), NAN);
        std::fill(up.begin(), up.end(), NAN);
      }
    }
    bench.synchronize();
    for (size_t i = 0; i < operands.size(); ++i) JAXMOE_CHECK(same_bits(operands[i].y, wanted[i]));
  }
}

JAXMOE_TEST_MAIN

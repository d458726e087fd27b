// SlotRing: every value is in its slot between ON and OFF in whatever order threads run, failures
// and aborts end a run with their cause, and the next run works.
#include "prefill/slot_ring.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <thread>

#include "native_testing.h"
#include "runtime/host_driver.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

constexpr size_t kBufferBytes[] = {96, 40};
constexpr uint8_t kPoison = 0xEE;  // no source has it

void ok(const Status& status) { JAXMOE_CHECK(status.ok(), "%s", status.message().c_str()); }

void fails_with(const Status& status, const char* part) {
  JAXMOE_CHECK(!status.ok() && contains(status.message(), part), "'%s' should contain '%s'",
               status.message().c_str(), part);
}

uint8_t value_at(int job, int buffer, size_t i) {
  uint32_t x = static_cast<uint32_t>(job) * 2654435761u + static_cast<uint32_t>(buffer) * 97 +
               static_cast<uint32_t>(i) * 31;
  return static_cast<uint8_t>((x ^ x >> 13) % kPoison);
}

// A ring over memory of its own, the sources of its jobs, and a model that checks them.
struct Setup {
  Setup(int num_slots, const HostDriverOptions& options,
        std::chrono::nanoseconds stall = SlotRing::kStall)
      : driver(std::make_shared<HostDriver>(options)), memory(num_slots) {
    std::vector<std::vector<SlotBuffer>> slots;
    for (auto& slot : memory) {
      slots.emplace_back();
      for (size_t bytes : kBufferBytes) {
        slot.emplace_back(bytes, kPoison);
        slots.back().push_back({slot.back().data(), bytes});
        driver->allow_destination(slot.back().data(), bytes);
      }
    }
    ok(SlotRing::create(driver, slots, &ring, stall));
    ok(driver->stream_create(&stream));
  }
  ~Setup() {
    ring = nullptr;
    ok(driver->stream_destroy(stream));
    for (const std::string& violation : driver->violations()) {
      JAXMOE_CHECK(false, "%s", violation.c_str());
    }
  }

  // Slots in turn, or (random) in any order with gaps and repeats.
  std::shared_ptr<const SlotJobs> make_jobs(int count, Random* random = nullptr) {
    auto jobs = std::make_shared<SlotJobs>();
    auto sources = std::make_shared<std::vector<std::vector<uint8_t>>>();
    for (int j = 0; j < count; ++j) {
      SlotJob job;
      job.slot = random != nullptr ? random->below(ring->num_slots()) : j % ring->num_slots();
      job.name = "layer " + std::to_string(j);
      for (int b = 0; b < 2; ++b) {
        std::vector<uint8_t>& source = sources->emplace_back(kBufferBytes[b]);
        for (size_t i = 0; i < source.size(); ++i) source[i] = value_at(j, b, i);
      }
      const uint8_t* first = (*sources)[sources->size() - 2].data();
      const uint8_t* second = sources->back().data();
      job.copies = {{0, 0, first, 32, 3, 32, 32}, {1, 0, second, 15}, {1, 15, second + 15, 25}};
      jobs->jobs.push_back(std::move(job));
    }
    jobs->keep.push_back(sources);
    return jobs;
  }

  // As a kernel would: reads the slot, then (OFF is near) what it held is gone.
  struct Kernel {
    Setup* setup;
    int job, slot;
    static void run(void* self) { static_cast<Kernel*>(self)->run(); }
    void run() const {
      for (int b = 0; b < 2; ++b) {
        std::vector<uint8_t>& buffer = setup->memory[slot][b];
        setup->driver->begin_read(buffer.data(), buffer.size());
        for (size_t i = 0; i < buffer.size(); ++i) {
          if (buffer[i] != value_at(job, b, i)) ++setup->wrong;
        }
        std::memset(buffer.data(), kPoison, buffer.size());
        setup->driver->end_read(buffer.data(), buffer.size());
      }
      ++setup->checked;
    }
  };

  // The model thread: on a stream, as on a GPU, or itself, as on the CPU platform. Ends at the
  // first error.
  Status model(const SlotJobs& jobs, bool on_stream, double max_delay_s = 0, uint64_t seed = 1) {
    Random random(seed);
    auto pause = [&] {
      if (max_delay_s > 0) {
        std::this_thread::sleep_for(
            std::chrono::duration<double>(max_delay_s * random.below(1000) / 1000.0));
      }
    };
    std::vector<std::unique_ptr<Kernel>> kernels;
    Status status;
    for (size_t j = 0; status.ok() && j < jobs.jobs.size(); ++j) {
      const int slot = jobs.jobs[j].slot;
      kernels.push_back(std::make_unique<Kernel>(Kernel{this, static_cast<int>(j), slot}));
      status = ring->acquire(slot, on_stream ? stream : nullptr);
      if (!status.ok()) break;
      pause();
      if (on_stream) {
        ok(driver->launch_host_func(stream, Kernel::run, kernels.back().get()));
      } else {
        kernels.back()->run();
      }
      pause();
      status = ring->release(slot, on_stream ? stream : nullptr);
    }
    (void)driver->stream_synchronize(stream);  // kernels end; an error is the ring's to tell
    return status;
  }

  void whole_run(int count, bool on_stream) {
    auto jobs = make_jobs(count);
    const int before = checked;
    ok(ring->start(jobs));
    ok(model(*jobs, on_stream));
    ok(ring->finish());
    JAXMOE_CHECK(checked - before == count && wrong == 0, "%d of %d, %d wrong", checked - before,
                 count, wrong.load());
  }

  std::shared_ptr<HostDriver> driver;
  std::vector<std::vector<std::vector<uint8_t>>> memory;
  std::shared_ptr<SlotRing> ring;
  DeviceStream stream = nullptr;
  std::atomic<int> checked{0}, wrong{0};
};

HostDriverOptions delays(double seconds, uint64_t seed = 1) {
  HostDriverOptions options;
  options.max_delay_s = seconds;
  options.seed = seed;
  return options;
}

}  // namespace

JAXMOE_TEST(every_value_arrives_in_rings_of_any_length) {
  for (int num_slots : {2, 3, 4, 7, 40}) {
    for (bool on_stream : {false, true}) {
      Setup setup(num_slots, {});
      setup.whole_run(1000, on_stream);
      // The second run begins with other slots in use than a fresh ring's.
      setup.whole_run(num_slots + 1, on_stream);
      setup.whole_run(1, on_stream);
      setup.whole_run(0, on_stream);
    }
  }
}

JAXMOE_TEST(delays_anywhere_change_nothing) {
  // Who is late: the copies, the model's thread, both. Thousands of layers in all.
  struct Late {
    double copies_s, model_s;
    int layers;
  };
  for (const Late& late : {Late{4e-5, 0, 600}, Late{0, 4e-5, 1500}, Late{2e-5, 2e-5, 800}}) {
    for (int num_slots : {2, 3, 5}) {
      for (bool on_stream : {false, true}) {
        Setup setup(num_slots, delays(late.copies_s, static_cast<uint64_t>(num_slots)));
        Random random(static_cast<uint64_t>(num_slots));
        auto jobs = setup.make_jobs(late.layers, &random);
        ok(setup.ring->start(jobs));
        ok(setup.model(*jobs, on_stream, late.model_s, 7));
        ok(setup.ring->finish());
        JAXMOE_CHECK(setup.checked == late.layers && setup.wrong == 0, "%d of %d, %d wrong",
                     setup.checked.load(), late.layers, setup.wrong.load());
        const SlotRingStats stats = setup.ring->stats();
        JAXMOE_CHECK(stats.jobs == late.layers && stats.copies == 3 * late.layers &&
                     stats.bytes == 136 * late.layers);
      }
    }
  }
}

JAXMOE_TEST(two_devices_stream_at_once) {
  Setup first(2, delays(3e-5, 1)), second(3, delays(3e-5, 2));
  std::thread other([&] { second.whole_run(700, true); });
  first.whole_run(700, true);
  other.join();
}

JAXMOE_TEST(a_failed_copy_fails_its_run_and_the_next_one_works) {
  for (bool on_stream : {false, true}) {
    for (bool at_submission : {false, true}) {
      for (int nth : {1, 2, 30, 120}) {
        Setup setup(3, delays(1e-5, static_cast<uint64_t>(nth)));
        auto jobs = setup.make_jobs(40);
        setup.driver->fail_copy(nth, at_submission, "the bus caught fire");
        ok(setup.ring->start(jobs));
        Status status = setup.model(*jobs, on_stream);
        // A stream that waits for copies which then fail learns it later than its thread.
        if (!on_stream) fails_with(status, "the bus caught fire");
        Status finish = setup.ring->finish();
        fails_with(finish, "the bus caught fire");
        const std::string job = "layer " + std::to_string((nth - 1) / 3) + " into slot";
        JAXMOE_CHECK(contains(finish.message(), job), "'%s' should contain '%s'",
                     finish.message().c_str(), job.c_str());
        fails_with(setup.ring->acquire(0, nullptr), "the bus caught fire");
        fails_with(setup.ring->finish(), "the bus caught fire");
        JAXMOE_CHECK(setup.wrong == 0);
        setup.whole_run(40, on_stream);
      }
    }
  }
}

JAXMOE_TEST(an_abort_at_any_time_ends_everything) {
  for (bool on_stream : {false, true}) {
    for (int trial = 0; trial < 40; ++trial) {
      Setup setup(2 + trial % 3, delays(3e-5, static_cast<uint64_t>(trial)));
      auto jobs = setup.make_jobs(300);
      ok(setup.ring->start(jobs));
      Status status;
      std::thread model([&] { status = setup.model(*jobs, on_stream, 2e-5); });
      std::this_thread::sleep_for(std::chrono::microseconds(trial * 150));
      setup.ring->abort("the client left");
      model.join();
      fails_with(status, "the client left");
      fails_with(setup.ring->finish(), "the client left");
      setup.ring->abort("again");  // nothing to do
      JAXMOE_CHECK(setup.wrong == 0);
      setup.whole_run(20, on_stream);
    }
  }
}

// Whether the earlier run released its slot, or was aborted before it came to that.
JAXMOE_TEST(a_run_waits_for_what_an_earlier_one_left_on_the_device) {
  for (bool released : {true, false}) {
    Setup setup(2, {});
    struct Busy {
      std::atomic<bool> go_on{false};
      static void run(void* self) {
        while (!static_cast<Busy*>(self)->go_on) std::this_thread::yield();
      }
    } busy;
    auto jobs = setup.make_jobs(1);
    ok(setup.ring->start(jobs));
    ok(setup.ring->acquire(0, setup.stream));
    ok(setup.driver->launch_host_func(setup.stream, Busy::run, &busy));
    Setup::Kernel kernel{&setup, 0, 0};
    ok(setup.driver->launch_host_func(setup.stream, Setup::Kernel::run, &kernel));
    if (released) {
      ok(setup.ring->release(0, setup.stream));
      ok(setup.ring->finish());
    } else {
      setup.ring->abort("enough");
    }
    auto next = setup.make_jobs(3);
    std::thread starter([&] {
      ok(setup.ring->start(next));
      ok(setup.model(*next, true));
      ok(setup.ring->finish());
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    JAXMOE_CHECK(setup.checked == 0);
    busy.go_on = true;
    starter.join();
    JAXMOE_CHECK(setup.checked == 4 && setup.wrong == 0, "%d, %d wrong", setup.checked.load(),
                 setup.wrong.load());
  }
}

JAXMOE_TEST(a_ring_may_be_destroyed_in_the_middle) {
  for (bool on_stream : {false, true}) {
    Setup setup(3, delays(1e-4));
    auto jobs = setup.make_jobs(100);
    ok(setup.ring->start(jobs));
    ok(setup.ring->acquire(0, on_stream ? setup.stream : nullptr));
    jobs = nullptr;  // the ring keeps what it copies from
  }
}

JAXMOE_TEST(a_run_that_cannot_go_on_is_ended) {
  using namespace std::chrono_literals;
  {  // The model wants slot 1 first, the loader fills slot 0 twice before.
    Setup setup(2, {}, 50ms);
    auto jobs = std::make_shared<SlotJobs>(*setup.make_jobs(3));
    jobs->jobs[1].slot = 0;
    jobs->jobs[2].slot = 1;
    ok(setup.ring->start(jobs));
    fails_with(setup.ring->acquire(1, nullptr), "nothing moved");
    fails_with(setup.ring->finish(), "2 1 0 0, 1 0 1 0");
    setup.whole_run(5, true);
  }
  {  // The model never comes.
    Setup setup(2, {}, 50ms);
    ok(setup.ring->start(setup.make_jobs(3)));
    fails_with(setup.ring->finish(), "finish waited while nothing moved");
    setup.whole_run(5, false);
  }
}

JAXMOE_TEST(misuse_is_named) {
  Setup setup(2, {});
  SlotRing& ring = *setup.ring;
  fails_with(ring.acquire(0, nullptr), "without a run");
  fails_with(ring.finish(), "no run");
  fails_with(ring.acquire(2, nullptr), "slot 2 of a ring of 2");
  fails_with(ring.release(-1, nullptr), "slot -1");

  struct Bad {
    const char* message;
    SlotCopy copy;
    int slot = 0;
  };
  const uint8_t source[200] = {};
  for (const Bad& bad :
       {Bad{"names slot 2", {0, 0, source, 1}, 2}, Bad{"names slot -1", {}, -1},
        Bad{"names buffer 2", {2, 0, source, 1}}, Bad{"copy of nothing", {0, 0, nullptr, 1}},
        Bad{"copy of nothing", {0, 0, source, 0}},
        Bad{"copy of nothing", {0, 0, source, 8, 2, 7, 8}},
        Bad{"up to byte 97 of buffer 0", {0, 1, source, 96}},
        Bad{"up to byte 44 of buffer 1", {1, 0, source, 11, 4, 11, 11}}}) {
    auto jobs = std::make_shared<SlotJobs>();
    jobs->jobs.push_back({bad.slot, "bad", {bad.copy}});
    fails_with(ring.start(jobs), bad.message);
  }

  auto again = [&] { ok(ring.start(setup.make_jobs(2))); };
  again();
  fails_with(ring.start(setup.make_jobs(2)), "under way");
  ok(ring.acquire(0, nullptr));
  fails_with(ring.acquire(0, nullptr), "acquired twice");
  fails_with(ring.finish(), "acquired twice");
  again();
  fails_with(ring.release(1, nullptr), "without an acquire");
  fails_with(ring.finish(), "without an acquire");
  again();
  ok(ring.acquire(0, nullptr));
  ok(ring.release(0, nullptr));
  fails_with(ring.acquire(0, nullptr), "more often than the run fills it (1 times)");
  fails_with(ring.finish(), "more often");
  setup.whole_run(4, false);

  std::shared_ptr<SlotRing> none;
  uint8_t memory[100];
  fails_with(SlotRing::create(setup.driver, {{{memory, 50}}}, &none), "at least 2");
  fails_with(SlotRing::create(setup.driver, {{{memory, 50}}, {{memory + 49, 50}}}, &none),
             "share memory");
  fails_with(SlotRing::create(setup.driver, {{{memory, 50}}, {{nullptr, 50}}}, &none), "empty");
}

JAXMOE_TEST(the_rate_limit_holds_and_is_what_stats_say) {
  HostDriverOptions options;
  options.bytes_per_s = 2e6;
  Setup setup(3, options);
  const auto began = std::chrono::steady_clock::now();
  setup.whole_run(300, true);  // 40.8 kB: 20 ms
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  const SlotRingStats stats = setup.ring->stats();
  const double least = static_cast<double>(stats.bytes) / options.bytes_per_s;
  JAXMOE_CHECK(stats.bytes == 300 * 136 && seconds >= least * 0.999, "%g s, %g s", seconds, least);
  JAXMOE_CHECK(stats.copy_s >= least * 0.999 && stats.copy_s <= seconds, "%g s", stats.copy_s);
}

// Counted, without a clock: in no stretch of time do more copies begin than the rate allows and
// one.
JAXMOE_TEST(a_pacer_keeps_its_rate_in_every_stretch_of_time) {
  using std::chrono::nanoseconds;
  Pacer pacer;
  Random random(3);
  JAXMOE_CHECK(pacer.book(1 << 30, Pacer::Time(nanoseconds(5))) == Pacer::Time(nanoseconds(5)),
               "no limit, no waiting");
  pacer.set_rate(1e9);                             // a byte a nanosecond
  std::vector<std::pair<int64_t, int64_t>> begun;  // when, bytes
  Pacer::Time now(nanoseconds(1000));
  int64_t idle = 0;
  for (int i = 0; i < 500; ++i) {
    const int64_t bytes = 1 + random.below(1000);
    const Pacer::Time begin = pacer.book(static_cast<size_t>(bytes), now);
    JAXMOE_CHECK(begin >= now && pacer.span(bytes) == nanoseconds(bytes), "copy %d", i);
    begun.push_back({nanoseconds(begin.time_since_epoch()).count(), bytes});
    now = begin;
    if (random.below(10) == 0) {  // the ring was full for a while
      const int64_t pause = random.below(5000);
      now += nanoseconds(pause);
      idle += pause;
    }
  }
  for (size_t first = 0; first < begun.size(); ++first) {
    int64_t bytes = 0;
    for (size_t last = first; last + 1 < begun.size(); ++last) {
      bytes += begun[last].second;
      JAXMOE_CHECK(begun[last + 1].first - begun[first].first >= bytes, "copies %zu to %zu", first,
                   last);
    }
  }
  int64_t total = 0;
  for (auto [at, bytes] : begun) total += bytes;
  JAXMOE_CHECK(begun.back().first - begun.front().first <= total + idle, "slower than it must");
  pacer.set_rate(0);
  JAXMOE_CHECK(!pacer.limits() && pacer.book(1 << 30, now) == now, "the limit is gone");
}

JAXMOE_TEST(a_pace_holds_every_copy_back_and_can_be_changed_meanwhile) {
  Setup setup(3, {});
  setup.ring->set_pace(4e6);
  const auto began = std::chrono::steady_clock::now();
  setup.whole_run(300, true);  // 40.8 kB: 10 ms
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  SlotRingStats stats = setup.ring->stats();
  const double wanted = static_cast<double>(stats.bytes) / 4e6;
  JAXMOE_CHECK(stats.paced_bytes == 300 * 136 && stats.bytes == stats.paced_bytes, "%lld",
               static_cast<long long>(stats.paced_bytes));
  JAXMOE_CHECK(std::abs(stats.paced_s - wanted) < 1e-6 * wanted + 300 * 3 * 1e-9, "%g s, %g s",
               stats.paced_s, wanted);
  JAXMOE_CHECK(seconds >= wanted - 96 / 4e6, "%g s, %g s", seconds, wanted);  // but for the last
  // A pace at which the run would take hours is lifted while a copy waits for its turn.
  setup.ring->set_pace(1.0);
  auto jobs = setup.make_jobs(30);
  ok(setup.ring->start(jobs));
  std::thread lifts([&] {
    while (setup.ring->stats().paced_bytes == 0) std::this_thread::yield();
    setup.ring->set_pace(0);
  });
  ok(setup.model(*jobs, true));
  ok(setup.ring->finish());
  lifts.join();
  stats = setup.ring->stats();
  JAXMOE_CHECK(stats.bytes == 30 * 136 && stats.paced_bytes == 96, "%lld",
               static_cast<long long>(stats.paced_bytes));
  // So is one that waits when the run is aborted.
  setup.ring->set_pace(1.0);
  ok(setup.ring->start(jobs));
  while (setup.ring->stats().paced_bytes == 0) std::this_thread::yield();
  setup.ring->abort("enough");
  fails_with(setup.ring->finish(), "enough");
  setup.ring->set_pace(0);
  setup.whole_run(10, false);
}

JAXMOE_TEST_MAIN

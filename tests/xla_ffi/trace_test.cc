// What the tracer counts and notes, and that it may be read while threads work.
#include "runtime/trace.h"

#include <thread>

#include "bench/kernel_loop.h"
#include "bench/peak.h"
#include "native_testing.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

class SpinJob final : public Job {
 public:
  SpinJob() : Job(Part::kLinear) {}
  void run_unit(int, int, uint32_t, int) noexcept override {
    const int64_t until = Tracer::now() + 20'000;
    while (Tracer::now() < until) cpu_pause();
  }
};

void run_job(CpuRuntime& runtime, uint32_t units) {
  const OperationScope scope(runtime.tracer(), Part::kLinear, units);
  SpinJob job;
  JobShape shape;
  shape.nodes = runtime.num_nodes();
  shape.spread(0, units);
  JobSlot* slot = runtime.pool().acquire();
  runtime.pool().run(slot, &job, shape);
  runtime.pool().release(slot);
}

}  // namespace

JAXMOE_TEST(nothing_is_counted_when_off) {
  auto runtime = make_runtime(2);
  run_job(*runtime, 8);
  runtime->tracer().mark(ProgramPoint::kBegin);
  runtime->tracer().mark(ProgramPoint::kEnd);
  JAXMOE_CHECK(runtime->tracer().take().empty());
  JAXMOE_CHECK(runtime->tracer().times().operation_ns[1].load() == 0);
  JAXMOE_CHECK(runtime->tracer().times().program_ns.load() == 0);
}

JAXMOE_TEST(units_lie_in_operations_and_busy_time_in_theirs) {
  for (int threads : {1, 3}) {
    auto runtime = make_runtime(threads);
    Tracer& tracer = runtime->tracer();
    tracer.set_level(TraceLevel::kEvents);
    for (int i = 0; i < 5; ++i) run_job(*runtime, 6);
    const uint64_t operation = tracer.times().operation_ns[1].load();
    const uint64_t busy = tracer.times().busy_ns[1].load();
    JAXMOE_CHECK(busy <= operation);
    if (threads == 1) JAXMOE_CHECK(busy >= 5 * 6 * 20'000);
    std::vector<TraceEvent> operations;
    size_t units = 0;
    const std::vector<Tracer::Taken> taken = tracer.take();
    for (const Tracer::Taken& track : taken) {
      JAXMOE_CHECK(track.dropped == 0);
      for (const TraceEvent& event : track.events) {
        JAXMOE_CHECK(event.part == Part::kLinear && event.end_ns >= event.begin_ns);
        if (event.kind == EventKind::kOperation) operations.push_back(event);
      }
    }
    JAXMOE_CHECK(operations.size() == 5);
    for (const Tracer::Taken& track : taken) {
      for (const TraceEvent& event : track.events) {
        if (event.kind != EventKind::kUnit) continue;
        ++units;
        int inside = 0;
        for (const TraceEvent& o : operations) {
          inside += o.begin_ns <= event.begin_ns && event.begin_ns <= o.end_ns;
        }
        JAXMOE_CHECK(inside == 1);
      }
    }
    JAXMOE_CHECK(units == 5 * 6, "%zu units", units);
    for (const Tracer::Taken& track : tracer.take()) JAXMOE_CHECK(track.events.empty());
  }
}

JAXMOE_TEST(waits_are_no_work) {
  auto runtime = make_runtime(1);
  Tracer& tracer = runtime->tracer();
  tracer.set_level(TraceLevel::kSeconds);
  std::atomic<bool> ready{false};
  std::thread other([&ready] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    ready = true;
  });
  const int64_t before = Tracer::busy_ns();
  {
    const UnitScope unit(tracer, Part::kExperts, 0);
    tracer.wait(Part::kExperts, [&ready] { return ready.load(); });
  }
  other.join();
  // The unit did nothing but wait at least 5 ms: what is left is less than that wait.
  JAXMOE_CHECK(Tracer::busy_ns() - before < 5'000'000);
  JAXMOE_CHECK(tracer.take().empty());  // seconds alone make no events
}

JAXMOE_TEST(full_rings_drop_and_say_so) {
  auto runtime = make_runtime(1);
  Tracer& tracer = runtime->tracer();
  tracer.set_level(TraceLevel::kEvents);
  for (uint64_t i = 0; i < Tracer::Ring::kCapacity + 7; ++i) {
    tracer.record(EventKind::kUnit, Part::kOther, 0, static_cast<int64_t>(i), 0);
  }
  std::vector<Tracer::Taken> taken = tracer.take();
  JAXMOE_CHECK(taken.size() == 1 && taken[0].dropped == 7);
  JAXMOE_CHECK(taken[0].events.size() == Tracer::Ring::kCapacity);
  JAXMOE_CHECK(taken[0].events.back().begin_ns ==
               static_cast<int64_t>(Tracer::Ring::kCapacity) - 1);
  tracer.record(EventKind::kUnit, Part::kOther, 0, 1, 2);
  taken = tracer.take();
  JAXMOE_CHECK(taken[0].events.size() == 1 && taken[0].dropped == 0);
}

JAXMOE_TEST(programs_are_told_by_their_marks) {
  auto runtime = make_runtime(1);
  Tracer& tracer = runtime->tracer();
  tracer.mark(ProgramPoint::kBegin);  // switched on in the middle: not counted
  tracer.set_level(TraceLevel::kEvents);
  tracer.mark(ProgramPoint::kLogits);
  tracer.mark(ProgramPoint::kEnd);
  JAXMOE_CHECK(tracer.times().program_ns.load() == 0 && tracer.take().empty());
  for (int i = 0; i < 2; ++i) {
    tracer.mark(ProgramPoint::kBegin);
    run_job(*runtime, 1);
    tracer.mark(ProgramPoint::kLogits);
    tracer.mark(ProgramPoint::kEnd);
  }
  const uint64_t program = tracer.times().program_ns.load();
  JAXMOE_CHECK(program >= tracer.times().operation_ns[1].load() &&
               program >= tracer.times().sampling_ns.load());
}

JAXMOE_TEST(taking_while_threads_work) {
  auto runtime = make_runtime(3);
  Tracer& tracer = runtime->tracer();
  tracer.set_level(TraceLevel::kEvents);
  std::atomic<bool> stop{false};
  size_t units = 0;
  auto count = [&units](const std::vector<Tracer::Taken>& taken) {
    for (const Tracer::Taken& track : taken) {
      for (const TraceEvent& event : track.events) units += event.kind == EventKind::kUnit;
    }
  };
  std::thread reader([&] {
    while (!stop) count(tracer.take());
  });
  for (int i = 0; i < 200; ++i) run_job(*runtime, 4);
  stop = true;
  reader.join();
  count(tracer.take());
  JAXMOE_CHECK(units == 200 * 4, "%zu units", units);
}

JAXMOE_TEST(measuring_loops_count_what_they_do) {
  auto runtime = make_runtime(2, 2);
  std::shared_ptr<HostStore> store;
  JAXMOE_CHECK(HostStore::create(runtime->topology(), {{4, 48, 64, WeightFormat::kBf16}},
                                 Backing::kArena, &store)
                   .ok());
  Measured measured;
  JAXMOE_CHECK(contains(measure_kernel(*runtime, *store, 0, Family::kVector, ActivationType::kBf16,
                                       4, 3, 2, &measured)
                            .message(),
                        "layer 0"));
  for (int e = 0; e < 4; ++e) {
    for (Matrix which : {Matrix::kGate, Matrix::kUp, Matrix::kDown}) {
      JAXMOE_CHECK(store->mark_loaded(0, e, which).ok());
    }
  }
  for (Family family : {Family::kVector, Family::kMatrix}) {
    measured = {};
    JAXMOE_CHECK(
        measure_kernel(*runtime, *store, 0, family, ActivationType::kBf16, 3, 5, 2, &measured)
            .ok());
    JAXMOE_CHECK(measured.seconds.size() == 2 && measured.bytes == 3 * 2 * 48 * 64 * 2);
    JAXMOE_CHECK(measured.flops == 3 * 2 * 2.0 * 5 * 48 * 64);
  }
  const int32_t ids[] = {0, 1, 1, 2, -1, 3};
  measured = {};
  JAXMOE_CHECK(measure_experts(*runtime, *store, 0, Family::kVector, ActivationType::kF32, 1, 2,
                               ids, 3, 4, &measured)
                   .ok());
  JAXMOE_CHECK(measured.seconds.size() == 4 && measured.bytes == 5 * 3 * 48 * 64 * 2);
  JAXMOE_CHECK(measured.flops == 5 * 6.0 * 48 * 64);
  JAXMOE_CHECK(!measure_experts(*runtime, *store, 1, Family::kVector, ActivationType::kF32, 1, 2,
                                ids, 3, 4, &measured)
                    .ok());
  JAXMOE_CHECK(measure_empty_job(*runtime, 10, 2, &measured).ok());
  for (const PeakLoop& loop : peak_loops(best_isa())) {
    for (double rate : peak_flops(loop, {allowed_cpus()[0]}, 1)) JAXMOE_CHECK(rate > 1e6);
  }
}

JAXMOE_TEST_MAIN

// Where the time of a step goes: seconds by part, and a trace of what each thread did.
//
// Off, an operation and a unit cost one relaxed load more. With kSeconds each reads the clock twice
// (about 25 ns a reading). With kEvents each also leaves an event in its thread's ring.
//
// What is measured, on the thread that called an operation: the operation, begin to end; within it,
// the time in which this thread worked on units (busy). The rest of an operation is waiting: taking
// part in the hand-out, inputs that another thread still makes, the other threads' last units.
#ifndef JAXMOE_RUNTIME_TRACE_H_
#define JAXMOE_RUNTIME_TRACE_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/futex.h"

namespace jaxmoe {

enum class Part : uint16_t { kExperts = 0, kLinear = 1, kAttention = 2, kOther = 3 };
inline constexpr int kNumParts = 4;

// What an event is: an operation or a unit of a part, a wait, a whole program, its sampling.
enum class EventKind : uint16_t {
  kOperation = 0,
  kUnit = 1,
  kWait = 2,
  kProgram = 3,
  kSampling = 4
};

enum class TraceLevel : int { kOff = 0, kSeconds = 1, kEvents = 2 };

// Moments of a compiled program, as its marks tell them.
enum class ProgramPoint : int { kBegin = 0, kLogits = 1, kEnd = 2 };

// Times are those of CLOCK_MONOTONIC in nanoseconds.
struct TraceEvent {
  int64_t begin_ns, end_ns;
  EventKind kind;
  Part part;
  int32_t detail;  // operation: layer or rows; unit: phase
};
static_assert(sizeof(TraceEvent) == 24);

// Totals since creation, in nanoseconds of the calling threads.
struct PartTimes {
  std::atomic<uint64_t> operation_ns[kNumParts] = {};
  std::atomic<uint64_t> busy_ns[kNumParts] = {};
  std::atomic<uint64_t> program_ns{0};
  std::atomic<uint64_t> sampling_ns{0};
};

class Tracer {
 public:
  // Events of one thread: made by it alone, taken by one reader at a time.
  struct Ring {
    static constexpr uint64_t kCapacity = uint64_t{1} << 16;  // 1.5 MiB; a decode step makes ~10^4
    std::string track;
    std::unique_ptr<TraceEvent[]> events{new TraceEvent[kCapacity]};
    std::atomic<uint64_t> head{0}, tail{0};
    std::atomic<uint64_t> dropped{0};  // did not fit before they were taken
  };
  struct Taken {
    std::string track;
    std::vector<TraceEvent> events;
    uint64_t dropped;
  };

  Tracer();
  Tracer(const Tracer&) = delete;
  Tracer& operator=(const Tracer&) = delete;

  void set_level(TraceLevel level) {
    level_.store(static_cast<int>(level), std::memory_order_relaxed);
  }
  bool on() const { return level_.load(std::memory_order_relaxed) != 0; }
  bool events_on() const {
    return level_.load(std::memory_order_relaxed) == static_cast<int>(TraceLevel::kEvents);
  }
  PartTimes& times() { return times_; }

  static int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  // The calling thread's track; threads that say nothing are callers.
  static void name_thread(int participant);

  void record(EventKind kind, Part part, int32_t detail, int64_t begin_ns, int64_t end_ns);
  // Everything recorded since the last call, a track a thread.
  std::vector<Taken> take();

  void mark(ProgramPoint point);

  // wait_for_peer, its time told apart from that of the unit it is in.
  template <typename Done>
  void wait(Part part, Done done) {
    if (done()) return;
    if (!on()) return wait_for_peer(done);
    const int64_t begin = now();
    wait_for_peer(done);
    const int64_t end = now();
    busy_ns() -= end - begin;
    if (events_on()) record(EventKind::kWait, part, 0, begin, end);
  }

  // Nanoseconds this thread worked on units, less what it waited in them.
  static int64_t& busy_ns();

 private:
  Ring* ring();

  std::atomic<int> level_{0};
  const uint64_t id_;
  PartTimes times_;
  std::mutex mutex_;  // guards the list of rings
  std::vector<std::unique_ptr<Ring>> rings_;
  std::atomic<int64_t> program_begin_ns_{0}, logits_ns_{0};
};

// An operation, from its constructor to its destructor.
class OperationScope {
 public:
  OperationScope(Tracer& tracer, Part part, int64_t detail) : tracer_(tracer), part_(part) {
    if (!tracer.on()) return;
    detail_ = static_cast<int32_t>(detail);
    busy_before_ = Tracer::busy_ns();
    begin_ = Tracer::now();
  }
  ~OperationScope() {
    if (begin_ == 0) return;
    const int64_t end = Tracer::now();
    const int p = static_cast<int>(part_);
    PartTimes& times = tracer_.times();
    times.operation_ns[p].fetch_add(static_cast<uint64_t>(end - begin_), std::memory_order_relaxed);
    times.busy_ns[p].fetch_add(static_cast<uint64_t>(Tracer::busy_ns() - busy_before_),
                               std::memory_order_relaxed);
    if (tracer_.events_on()) tracer_.record(EventKind::kOperation, part_, detail_, begin_, end);
  }
  OperationScope(const OperationScope&) = delete;
  OperationScope& operator=(const OperationScope&) = delete;

 private:
  Tracer& tracer_;
  const Part part_;
  int32_t detail_ = 0;
  int64_t busy_before_ = 0, begin_ = 0;
};

// A unit, likewise; on whichever thread took it.
class UnitScope {
 public:
  UnitScope(Tracer& tracer, Part part, int phase) : tracer_(tracer), part_(part), phase_(phase) {
    if (tracer.on()) begin_ = Tracer::now();
  }
  ~UnitScope() {
    if (begin_ == 0) return;
    const int64_t end = Tracer::now();
    Tracer::busy_ns() += end - begin_;
    if (tracer_.events_on()) tracer_.record(EventKind::kUnit, part_, phase_, begin_, end);
  }
  UnitScope(const UnitScope&) = delete;
  UnitScope& operator=(const UnitScope&) = delete;

 private:
  Tracer& tracer_;
  const Part part_;
  const int phase_;
  int64_t begin_ = 0;
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_TRACE_H_

#include "runtime/trace.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace jaxmoe {
namespace {

// Never the id of a tracer: a thread that recorded nothing yet.
constexpr uint64_t kNone = 0;
std::atomic<uint64_t> next_id{kNone + 1};

struct Local {
  uint64_t tracer = kNone;
  Tracer::Ring* ring = nullptr;
  int participant = 0;
  int64_t busy_ns = 0;
};

Local& local() {
  thread_local Local instance;
  return instance;
}

}  // namespace

Tracer::Tracer() : id_(next_id.fetch_add(1)) {}

int64_t& Tracer::busy_ns() { return local().busy_ns; }

void Tracer::name_thread(int participant) { local().participant = participant; }

Tracer::Ring* Tracer::ring() {
  Local& mine = local();
  // A thread alternates between tracers only in tests; it then gets another ring each time.
  if (mine.tracer != id_) {
    auto ring = std::make_unique<Ring>();
    ring->track = mine.participant > 0
                      ? "worker " + std::to_string(mine.participant)
                      : "caller " + std::to_string(static_cast<int64_t>(syscall(SYS_gettid)));
    mine.tracer = id_;
    mine.ring = ring.get();
    std::lock_guard<std::mutex> lock(mutex_);
    rings_.push_back(std::move(ring));
  }
  return mine.ring;
}

void Tracer::record(EventKind kind, Part part, int32_t detail, int64_t begin_ns, int64_t end_ns) {
  Ring* to = ring();
  const uint64_t head = to->head.load(std::memory_order_relaxed);
  if (head - to->tail.load(std::memory_order_acquire) >= Ring::kCapacity) {
    to->dropped.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  to->events[head % Ring::kCapacity] = {begin_ns, end_ns, kind, part, detail};
  to->head.store(head + 1, std::memory_order_release);
}

std::vector<Tracer::Taken> Tracer::take() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Taken> taken;
  for (const std::unique_ptr<Ring>& ring : rings_) {
    const uint64_t head = ring->head.load(std::memory_order_acquire);
    const uint64_t tail = ring->tail.load(std::memory_order_relaxed);
    Taken& track = taken.emplace_back(
        Taken{ring->track, {}, ring->dropped.exchange(0, std::memory_order_relaxed)});
    track.events.reserve(head - tail);
    for (uint64_t i = tail; i < head; ++i) {
      track.events.push_back(ring->events[i % Ring::kCapacity]);
    }
    ring->tail.store(head, std::memory_order_release);
  }
  return taken;
}

void Tracer::mark(ProgramPoint point) {
  if (!on()) return;
  const int64_t at = now();
  if (point == ProgramPoint::kBegin) {
    program_begin_ns_.store(at, std::memory_order_relaxed);
  } else if (point == ProgramPoint::kLogits) {
    logits_ns_.store(at, std::memory_order_relaxed);
  } else {
    // Zero: switched on in the middle of a program.
    const int64_t begin = program_begin_ns_.exchange(0, std::memory_order_relaxed);
    const int64_t logits = logits_ns_.exchange(0, std::memory_order_relaxed);
    if (begin == 0 || logits < begin) return;
    times_.program_ns.fetch_add(static_cast<uint64_t>(at - begin), std::memory_order_relaxed);
    times_.sampling_ns.fetch_add(static_cast<uint64_t>(at - logits), std::memory_order_relaxed);
    if (events_on()) {
      record(EventKind::kProgram, Part::kOther, 0, begin, at);
      record(EventKind::kSampling, Part::kOther, 0, logits, at);
    }
  }
}

}  // namespace jaxmoe

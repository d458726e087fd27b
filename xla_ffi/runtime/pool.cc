#include "runtime/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "runtime/float_mode.h"
#include "runtime/futex.h"

namespace jaxmoe {
namespace {

static_assert(kMaxOpenJobs == 32, "slot masks are 32 bits wide");

// How long an idle worker spins before it sleeps. Between two operations of a decode step lie some
// 10 to 100 us of XLA's own work, between two steps about a millisecond of Python, and waking a
// sleeper costs 5 to 50 us and a system call, on virtual machines up to a millisecond (with 200 us
// of patience a second thread did a quarter of its share there). So workers stay awake while a
// sequence is decoded, and sleep when the engine idles.
constexpr std::chrono::microseconds kIdlePatience{2000};
// How long a caller spins for the last units of its job, which are already running.
constexpr std::chrono::microseconds kFinishPatience{100};

constexpr uint64_t kFieldMask = (1u << 20) - 1;
constexpr uint32_t kGenerationMask = (1u << 24) - 1;

constexpr uint64_t pack_counter(uint32_t generation, uint32_t limit) {
  return static_cast<uint64_t>(generation) << 40 | static_cast<uint64_t>(limit) << 20;
}

}  // namespace

uint64_t JobShape::total() const {
  uint64_t sum = 0;
  for (int p = 0; p < phases; ++p) {
    for (int n = 0; n < nodes; ++n) sum += units[p][n];
  }
  return sum;
}

void JobShape::spread(int phase, uint32_t count) {
  for (int n = 0; n < nodes; ++n) {
    units[phase][n] = static_cast<uint32_t>(static_cast<uint64_t>(count) * (n + 1) / nodes -
                                            static_cast<uint64_t>(count) * n / nodes);
  }
}

Pool::Pool(const Topology& topology, std::vector<Placement> placement, Isa isa)
    : placement_(std::move(placement)),
      isa_(isa),
      participants_on_(topology.nodes.size(), 0),
      slots_(new JobSlot[kMaxOpenJobs]) {
  for (int i = 0; i < kMaxOpenJobs; ++i) slots_[i].index_ = i;
  for (const Placement& p : placement_) ++participants_on_[p.node];
  if (!topology.fake && topology.nodes.size() > 1) {
    for (size_t n = 0; n < topology.nodes.size(); ++n) {
      for (int cpu : topology.nodes[n].cpus) {
        if (cpu >= static_cast<int>(node_of_cpu_.size())) node_of_cpu_.resize(cpu + 1, 0);
        node_of_cpu_[cpu] = static_cast<int>(n);
      }
    }
  }
  // Signals belong to the interpreter's threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (int i = 1; i < num_participants(); ++i) threads_.emplace_back([this, i] { worker_main(i); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Pool::~Pool() {
  stop_.store(true, std::memory_order_seq_cst);
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake(&epoch_);
  for (std::thread& thread : threads_) thread.join();
}

JobSlot* Pool::try_acquire() {
  uint32_t free = free_slots_.load(std::memory_order_relaxed);
  while (free != 0) {
    uint32_t lowest = free & -free;
    if (free_slots_.compare_exchange_weak(free, free & ~lowest, std::memory_order_acquire,
                                          std::memory_order_relaxed)) {
      return &slots_[__builtin_ctz(lowest)];
    }
  }
  return nullptr;
}

JobSlot* Pool::acquire() {
  JobSlot* slot = try_acquire();
  while (slot == nullptr) {
    sched_yield();
    slot = try_acquire();
  }
  return slot;
}

void Pool::release(JobSlot* slot) {
  free_slots_.fetch_or(1u << slot->index_, std::memory_order_release);
}

void Pool::start(JobSlot* slot, Job* job, const JobShape& shape) {
  uint64_t total = shape.total();
  slot->generation_ = (slot->generation_ + 1) & kGenerationMask;
  slot->job_.store(job, std::memory_order_relaxed);
  slot->left_.store(static_cast<uint32_t>(total), std::memory_order_relaxed);
  for (int p = 0; p < shape.phases; ++p) {
    for (int n = 0; n < shape.nodes; ++n) {
      slot->counters_[p][n].value.store(pack_counter(slot->generation_, shape.units[p][n]),
                                        std::memory_order_release);
    }
  }
  slot->shape_.store(static_cast<uint64_t>(slot->generation_) << 16 |
                         static_cast<uint64_t>(shape.phases) << 8 |
                         static_cast<uint64_t>(shape.nodes),
                     std::memory_order_release);
  if (threads_.empty() || total == 0) return;
  open_slots_.fetch_or(1u << slot->index_, std::memory_order_seq_cst);
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  uint32_t asleep = sleepers_.load(std::memory_order_seq_cst);
  if (asleep > 0) futex_wake(&epoch_, static_cast<int>(std::min<uint64_t>(asleep, total)));
}

void Pool::finish(JobSlot* slot) {
  {
    const FloatMode mode;
    kernel_thread_init(isa_);
    participate(slot, 0, caller_node());
    kernel_thread_release(isa_);
  }
  auto done = [slot] { return slot->left_.load(std::memory_order_acquire) == 0; };
  if (!spin_until(done, kFinishPatience)) {
    slot->waiter_asleep_.store(1, std::memory_order_seq_cst);
    for (;;) {
      uint32_t left = slot->left_.load(std::memory_order_seq_cst);
      if (left == 0) break;
      futex_wait(&slot->left_, left);
    }
    slot->waiter_asleep_.store(0, std::memory_order_relaxed);
  }
  if (!threads_.empty()) open_slots_.fetch_and(~(1u << slot->index_), std::memory_order_relaxed);
}

void Pool::run_alone(Job* job, const JobShape& shape) {
  const FloatMode mode;
  kernel_thread_init(isa_);
  for (int p = 0; p < shape.phases; ++p) {
    for (int n = 0; n < shape.nodes; ++n) {
      for (uint32_t unit = 0; unit < shape.units[p][n]; ++unit) {
        const UnitScope scope(tracer_, job->part(), p);
        job->run_unit(p, n, unit, 0);
      }
    }
  }
  kernel_thread_release(isa_);
}

bool Pool::participate(JobSlot* slot, int participant, int home_node) {
  bool worked = false;
  for (;;) {
    const uint64_t shape = slot->shape_.load(std::memory_order_acquire);
    const uint64_t generation = shape >> 16;
    const int phases = static_cast<int>(shape >> 8 & 0xff);
    const int nodes = static_cast<int>(shape & 0xff);
    bool retry = false, took = false;
    for (int p = 0; p < phases && !took && !retry; ++p) {
      for (int i = 0; i < nodes && !took && !retry; ++i) {
        const int node = (home_node + i) % nodes;
        std::atomic<uint64_t>& counter = slot->counters_[p][node].value;
        uint64_t value = counter.load(std::memory_order_acquire);
        for (;;) {
          if (value >> 40 != generation) {  // the slot holds another job by now
            retry = true;
            break;
          }
          const uint32_t next = static_cast<uint32_t>(value & kFieldMask);
          if (next >= (value >> 20 & kFieldMask)) break;
          if (counter.compare_exchange_weak(value, value + 1, std::memory_order_acq_rel,
                                            std::memory_order_acquire)) {
            Job* job = slot->job_.load(std::memory_order_relaxed);
            {
              const UnitScope scope(tracer_, job->part(), p);
              job->run_unit(p, node, next, participant);
            }
            // From here on the job may be gone; the slot stays.
            if (slot->left_.fetch_sub(1, std::memory_order_seq_cst) == 1 &&
                slot->waiter_asleep_.load(std::memory_order_seq_cst) != 0) {
              futex_wake(&slot->left_);
            }
            took = worked = true;
            break;
          }
        }
      }
    }
    if (!took && !retry) return worked;
  }
}

int Pool::caller_node() const {
  if (node_of_cpu_.empty()) return 0;
  int cpu = sched_getcpu();
  return cpu >= 0 && cpu < static_cast<int>(node_of_cpu_.size()) ? node_of_cpu_[cpu] : 0;
}

void Pool::worker_main(int participant) {
  const Placement place = placement_[participant];
  char name[16];
  std::snprintf(name, sizeof(name), "jaxmoe-%d", participant);
  pthread_setname_np(pthread_self(), name);
  Tracer::name_thread(participant);
  size_t set_bytes = CPU_ALLOC_SIZE(place.cpu + 1);
  cpu_set_t* set = CPU_ALLOC(place.cpu + 1);
  CPU_ZERO_S(set_bytes, set);
  CPU_SET_S(place.cpu, set_bytes, set);
  if (pthread_setaffinity_np(pthread_self(), set_bytes, set) != 0) failed_pins_.fetch_add(1);
  CPU_FREE(set);

  const FloatMode mode;
  kernel_thread_init(isa_);
  while (!stop_.load(std::memory_order_acquire)) {
    const uint32_t seen = epoch_.load(std::memory_order_seq_cst);
    bool worked = false;
    for (uint32_t open = open_slots_.load(std::memory_order_seq_cst); open != 0; open &= open - 1) {
      worked |= participate(&slots_[__builtin_ctz(open)], participant, place.node);
    }
    if (worked) continue;
    auto changed = [this, seen] { return epoch_.load(std::memory_order_acquire) != seen; };
    if (spin_until(changed, kIdlePatience)) continue;
    kernel_thread_release(isa_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    futex_wait(&epoch_, seen);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    kernel_thread_init(isa_);
  }
  kernel_thread_release(isa_);
}

}  // namespace jaxmoe

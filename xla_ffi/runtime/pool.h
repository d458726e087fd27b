// Worker threads, and how a job's units are handed out to them.
//
// A job is a list of units in a few phases, on the NUMA nodes that own their memory. The thread
// that wants the result takes part; the pool's other threads are pinned and join whatever job is
// open. A unit is taken with one compare-and-swap on its (phase, node) counter; nobody takes a unit
// of a phase before every unit of the earlier phases, on all nodes, was taken. So a unit may wait
// for units of earlier phases: they are all running.
//
// Several jobs may be open at once (an asynchronous experts job while a linear map runs): workers
// stay with a job until its units are handed out, and each caller always works on its own.
#ifndef JAXMOE_RUNTIME_POOL_H_
#define JAXMOE_RUNTIME_POOL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/scratch.h"
#include "runtime/topology.h"
#include "runtime/trace.h"

namespace jaxmoe {

inline constexpr int kMaxPhases = 4;
inline constexpr int kMaxNodes = 8;
inline constexpr int kMaxOpenJobs = 32;
inline constexpr uint32_t kMaxUnits = (1u << 20) - 1;  // per phase and node

class Job {
 public:
  explicit Job(Part part = Part::kOther) : part_(part) {}
  virtual ~Job() = default;
  Part part() const { return part_; }
  // `participant` is below Pool::num_participants() and unique among the threads now working on
  // this job: it indexes per-thread scratch.
  virtual void run_unit(int phase, int node, uint32_t unit, int participant) noexcept = 0;

 private:
  const Part part_;
};

struct JobShape {
  int phases = 1;
  int nodes = 1;
  uint32_t units[kMaxPhases][kMaxNodes] = {};

  uint64_t total() const;
  // Spreads `count` units of a phase that have no home over the nodes; start(node) is then the
  // first.
  void spread(int phase, uint32_t count);
};

// Where an open job is known to the pool. Slots are never freed, so a late worker may look at one
// safely.
class JobSlot {
 public:
  Scratch scratch;  // of the slot's present holder

 private:
  friend class Pool;
  struct alignas(kCacheLine) Counter {
    // generation 24 bits | limit 20 bits | next 20 bits. The generation makes a stale view of the
    // counters of a finished job harmless: the swap fails.
    std::atomic<uint64_t> value{0};
  };
  Counter counters_[kMaxPhases][kMaxNodes];
  alignas(kCacheLine) std::atomic<uint64_t> shape_{0};  // generation << 16 | phases << 8 | nodes
  std::atomic<Job*> job_{nullptr};
  alignas(kCacheLine) std::atomic<uint32_t> left_{0};  // units not finished
  std::atomic<uint32_t> waiter_asleep_{0};
  uint32_t generation_ = 0;
  int index_ = 0;
};

class Pool {
 public:
  // One participant per placement; the first is the caller's and gets no thread.
  Pool(const Topology& topology, std::vector<Placement> placement, Isa isa);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_participants() const { return static_cast<int>(placement_.size()); }
  int participants_on(int node) const { return participants_on_[node]; }
  Tracer& tracer() { return tracer_; }
  int num_failed_pins() const { return failed_pins_.load(std::memory_order_relaxed); }

  // A slot to describe and run a job in. acquire waits until one is free; try_acquire may return
  // nullptr.
  JobSlot* acquire();
  JobSlot* try_acquire();
  void release(JobSlot* slot);

  // Opens the job to the workers and returns; finish() works on it and returns when all units are
  // done. The job must live until then.
  void start(JobSlot* slot, Job* job, const JobShape& shape);
  void finish(JobSlot* slot);
  void run(JobSlot* slot, Job* job, const JobShape& shape) {
    start(slot, job, shape);
    finish(slot);
  }
  // The calling thread does all units: for work too small to share.
  void run_alone(Job* job, const JobShape& shape);

 private:
  void worker_main(int participant);
  bool participate(JobSlot* slot, int participant, int home_node);
  int caller_node() const;

  const std::vector<Placement> placement_;
  const Isa isa_;
  Tracer tracer_;
  std::vector<int> participants_on_;
  std::vector<int> node_of_cpu_;  // empty: one node, or a fake topology
  std::unique_ptr<JobSlot[]> slots_;
  std::vector<std::thread> threads_;
  std::atomic<int> failed_pins_{0};
  std::atomic<bool> stop_{false};
  alignas(kCacheLine) std::atomic<uint32_t> free_slots_{0xffffffffu};
  alignas(kCacheLine) std::atomic<uint32_t> open_slots_{0};
  alignas(kCacheLine) std::atomic<uint32_t> epoch_{0};  // counts jobs opened; sleepers wait on it
  alignas(kCacheLine) std::atomic<uint32_t> sleepers_{0};
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_POOL_H_

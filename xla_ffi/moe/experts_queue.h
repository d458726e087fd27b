// experts in two halves: submit starts a step's routed experts on the pool and returns a ticket,
// wait gives their result. Between the two the caller's thread does something else (the other
// microbatch's attention).
#ifndef JAXMOE_MOE_EXPERTS_QUEUE_H_
#define JAXMOE_MOE_EXPERTS_QUEUE_H_

#include <cstdint>
#include <memory>
#include <mutex>

#include "moe/experts.h"
#include "runtime/cpu_runtime.h"
#include "runtime/host_store.h"

namespace jaxmoe {

class ExpertsQueue {
 public:
  // Two microbatches of a few concurrent steps; must stay below kMaxOpenJobs, so that operations
  // that run in their caller always find a slot.
  static constexpr int kMaxTickets = 16;

  explicit ExpertsQueue(CpuRuntime& runtime) : runtime_(runtime) {}
  ~ExpertsQueue();  // finishes what was submitted and never waited for
  ExpertsQueue(const ExpertsQueue&) = delete;
  ExpertsQueue& operator=(const ExpertsQueue&) = delete;

  // Copies x, ids, weights and the chosen experts' biases; call.y is ignored. The store is kept
  // until wait.
  Status submit(std::shared_ptr<HostStore> store, const ExpertsCall& call, int32_t* ticket);
  // Blocks until done (working meanwhile) and writes y [num_tokens, hidden]. A ticket is good for
  // one wait; it is kept when the shape is wrong.
  Status wait(int32_t ticket, int64_t num_tokens, int64_t hidden, float* y);

 private:
  struct Entry {
    bool used = false, waited_for = false;
    int32_t generation = 0;
    JobSlot* slot = nullptr;
    std::shared_ptr<HostStore> store;
    ExpertsJob job;
    Scratch staging;  // x, ids, weights, y, biases
    const float* y = nullptr;
    int64_t num_tokens = 0, hidden = 0;
    bool running = false;
  };
  void retire(Entry* entry);

  CpuRuntime& runtime_;
  std::mutex mutex_;  // guards used, waited_for, generation and the shape
  Entry entries_[kMaxTickets];
};

}  // namespace jaxmoe

#endif  // JAXMOE_MOE_EXPERTS_QUEUE_H_

#include "moe/experts_queue.h"

#include <cstring>

namespace jaxmoe {
namespace {

// Copies the rows of chosen experts from one [experts, intermediate] array to another; the rest of
// a model's biases is many times what a step reads.
void copy_chosen_rows(const ExpertsCall& call, const ExpertLayerSpec& layer, const float* from,
                      float* to) {
  for (int64_t i = 0; i < call.num_tokens * call.per_token; ++i) {
    const int32_t e = call.expert_ids[i];
    if (e < 0 || e >= layer.num_experts) continue;  // plan() refuses what is out of range
    const int64_t row = static_cast<int64_t>(e) * layer.intermediate;
    std::memcpy(to + row, from + row, static_cast<size_t>(layer.intermediate) * sizeof(float));
  }
}

}  // namespace

static_assert(ExpertsQueue::kMaxTickets < kMaxOpenJobs, "synchronous operations need slots too");

ExpertsQueue::~ExpertsQueue() {
  for (Entry& entry : entries_) {
    if (!entry.used) continue;
    if (entry.running) runtime_.pool().finish(entry.slot);
    retire(&entry);
  }
}

void ExpertsQueue::retire(Entry* entry) {
  runtime_.pool().release(entry->slot);
  entry->slot = nullptr;
  entry->store.reset();
  entry->running = false;
  std::lock_guard<std::mutex> lock(mutex_);
  entry->used = entry->waited_for = false;
}

Status ExpertsQueue::submit(std::shared_ptr<HostStore> store, const ExpertsCall& call,
                            int32_t* ticket) {
  const OperationScope scope(runtime_.tracer(), Part::kExperts, call.layer);
  Entry* entry = nullptr;
  int index = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (; index < kMaxTickets && entries_[index].used; ++index) {
    }
    if (index < kMaxTickets) {
      entry = &entries_[index];
      entry->used = true;
      entry->generation = (entry->generation + 1) & 0x3ffffff;
    }
  }
  if (entry == nullptr) {
    return Status::error(
        "experts_submit: " + std::to_string(kMaxTickets) +
        " submitted calls were not waited for; every ticket needs its experts_wait");
  }
  entry->slot = runtime_.pool().acquire();
  entry->store = std::move(store);
  const ExpertLayerSpec& layer = entry->store->layer(call.layer);
  entry->num_tokens = call.num_tokens;
  entry->hidden = layer.hidden;

  const size_t x_bytes = static_cast<size_t>(call.num_tokens * entry->hidden) *
                         (call.x_type == ActivationType::kF32 ? 4 : 2);
  const size_t ids_bytes = static_cast<size_t>(call.num_tokens * call.per_token) * sizeof(int32_t);
  Layout layout;
  const size_t x = layout.add(x_bytes), ids = layout.add(ids_bytes),
               weights = layout.add(ids_bytes);
  const size_t y = layout.add(static_cast<size_t>(call.num_tokens * entry->hidden) * sizeof(float));
  const size_t bias_bytes =
      call.gate_bias == nullptr
          ? 0
          : static_cast<size_t>(layer.num_experts) * static_cast<size_t>(layer.intermediate) * 4;
  const size_t gate_bias = layout.add(bias_bytes), up_bias = layout.add(bias_bytes);
  Status status;
  if (!entry->staging.reserve(layout.total())) {
    status = Status::error("out of memory for " + std::to_string(layout.total()) +
                           " bytes of staged activations");
  }
  JobShape shape;
  if (status.ok()) {
    char* base = entry->staging.data();
    std::memcpy(base + x, call.x, x_bytes);
    std::memcpy(base + ids, call.expert_ids, ids_bytes);
    std::memcpy(base + weights, call.weights, ids_bytes);
    ExpertsCall staged = call;
    staged.x = base + x;
    staged.expert_ids = reinterpret_cast<const int32_t*>(base + ids);
    staged.weights = reinterpret_cast<const float*>(base + weights);
    staged.y = reinterpret_cast<float*>(base + y);
    entry->y = staged.y;
    if (bias_bytes > 0) {
      float* gate = reinterpret_cast<float*>(base + gate_bias);
      float* up = reinterpret_cast<float*>(base + up_bias);
      copy_chosen_rows(call, layer, call.gate_bias, gate);
      copy_chosen_rows(call, layer, call.up_bias, up);
      staged.gate_bias = gate;
      staged.up_bias = up;
    }
    status = entry->job.plan(runtime_, *entry->store, staged, &entry->slot->scratch, &shape);
  }
  if (!status.ok()) {
    retire(entry);
    return status;
  }
  entry->running = shape.total() > 0;
  // Small jobs go to the workers too: the point is not to spend the caller's time.
  if (entry->running) runtime_.pool().start(entry->slot, &entry->job, shape);
  *ticket = entry->generation * kMaxTickets + index;
  return {};
}

Status ExpertsQueue::wait(int32_t ticket, int64_t num_tokens, int64_t hidden, float* y) {
  const OperationScope scope(runtime_.tracer(), Part::kExperts, -1);
  Entry* entry = ticket >= 0 ? &entries_[ticket % kMaxTickets] : nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (entry == nullptr || !entry->used || entry->waited_for ||
        entry->generation != ticket / kMaxTickets) {
      return Status::error(
          "experts_wait: ticket " + std::to_string(ticket) +
          " is not outstanding: each ticket of experts_submit is good for one wait");
    }
    if (entry->num_tokens != num_tokens || entry->hidden != hidden) {
      return Status::error("experts_wait: the result was asked for as [" +
                           std::to_string(num_tokens) + ", " + std::to_string(hidden) + "], but [" +
                           std::to_string(entry->num_tokens) + ", " +
                           std::to_string(entry->hidden) + "] was submitted");
    }
    entry->waited_for = true;
  }
  if (entry->running) runtime_.pool().finish(entry->slot);
  std::memcpy(y, entry->y, static_cast<size_t>(num_tokens * hidden) * sizeof(float));
  retire(entry);
  return {};
}

}  // namespace jaxmoe

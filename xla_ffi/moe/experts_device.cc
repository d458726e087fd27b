#include "moe/experts_device.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "runtime/futex.h"

namespace jaxmoe {
namespace {

using Clock = std::chrono::steady_clock;

// The polling thread is hot while a program is under way: between two layers lie tens of
// microseconds of attention. Longer silence means a stalled or failed stream, or a long prefill on
// the same stream: then naps, whose length is what a call may wait longer.
constexpr std::chrono::milliseconds kHotPatience{20};
constexpr std::chrono::microseconds kNap{50};
// With nothing enqueued: as the pool's workers, awake from one step to the next.
constexpr std::chrono::milliseconds kIdlePatience{2};
// At shutdown: a stream that makes no progress for so long has failed.
constexpr std::chrono::seconds kDrainPatience{5};
// cuMemHostRegister locks whole pages.
constexpr size_t kPage = 4096;

std::atomic_ref<uint32_t> word(uint32_t* address) { return std::atomic_ref<uint32_t>(*address); }

// Whether a counter that wraps has come to `value`.
bool reached(uint32_t counter, uint32_t value) {
  return static_cast<int32_t>(counter - value) >= 0;
}

int64_t nanoseconds(Clock::duration duration) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
}

}  // namespace

const char* device_signal_name(DeviceSignal signal) {
  return signal == DeviceSignal::kValues ? "stream memory operations" : "host functions";
}

// Page-locked memory.
struct ExpertsDevice::Block {
  DeviceDriver* driver = nullptr;
  char* data = nullptr;
  size_t bytes = 0;

  Status allocate(DeviceDriver* owner, size_t wanted) {
    const size_t size = align_up(wanted, kPage);
    data = static_cast<char*>(std::aligned_alloc(kPage, size));
    if (data == nullptr) {
      return Status::error("out of memory for " + std::to_string(size) + " bytes of staging");
    }
    std::memset(data, 0, size);  // the pages exist before they are locked
    Status status = owner->register_host(data, size, false);
    if (!status.ok()) {
      std::free(data);
      data = nullptr;
      return status;
    }
    driver = owner;
    bytes = size;
    return {};
  }
  void leak() { data = nullptr; }
  ~Block() {
    if (data == nullptr) return;
    (void)driver->unregister_host(data, bytes);
    std::free(data);
  }
};

struct ExpertsDevice::BiasCopy {
  Block block;
  const float* gate = nullptr;
  const float* up = nullptr;
  // They have arrived once this call was signalled; lost: a later one was, and this never.
  Channel* channel = nullptr;
  uint32_t generation = 0;
  std::atomic<bool> arrived{false}, lost{false};
  std::weak_ptr<HostStore> store;
};

struct ExpertsDevice::Call {
  Channel* channel = nullptr;
  uint32_t generation = 0;
  std::shared_ptr<HostStore> store;
  ExpertsCall call;  // with the addresses of the staging
  BiasCopy* biases = nullptr;
};

struct ExpertsDevice::Channel {
  ExpertsDevice* owner = nullptr;
  Device* device = nullptr;
  int slot = 0;
  // Words of page-locked memory: the generation that was signalled to the host, and by it.
  Block words;
  uint32_t* ready = nullptr;
  uint32_t* done = nullptr;

  std::mutex enqueue_mutex;  // guards what is up to the next comment
  uint32_t generation = 0;   // of the last call submitted
  bool open = false;         // it has no wait yet
  int64_t run_id = 0, num_tokens = 0, hidden = 0;
  float* y = nullptr;
  DeviceStream stream = nullptr;                // of the last call
  DeviceEvent copied = nullptr;                 // x is in staging; for a side stream
  DeviceEvent finished = nullptr;               // the host function has returned
  DeviceEvent consumed = nullptr;               // y has left the staging
  Status broken;                                // a call was left half enqueued
  std::vector<std::unique_ptr<Block>> staging;  // the last is in use; no stream is asked whether it
                                                // still reads the others, which are smaller

  std::mutex calls_mutex;  // guards calls; references to them stay good
  std::deque<Call> calls;  // in order of generation

  // Of the thread that serves.
  ExpertsJob job;
  std::atomic<uint32_t> served{0};
};

struct ExpertsDevice::Device {
  std::shared_ptr<DeviceDriver> driver;
  int ordinal = 0;
  DeviceSignal signal = DeviceSignal::kValues;
  // One for all slots: host functions run in the order in which they were enqueued.
  DeviceStream side = nullptr;
  std::mutex side_mutex;
  std::unique_ptr<Channel> channels[kMaxSlots];
};

ExpertsDevice::ExpertsDevice(CpuRuntime& runtime, MakeDriver make_driver,
                             std::optional<DeviceSignal> signal)
    : runtime_(runtime), make_driver_(std::move(make_driver)), forced_signal_(signal) {}

ExpertsDevice::~ExpertsDevice() {
  closing_.store(true);
  const bool drained = drain();
  stop_.store(true);
  wake_.fetch_add(1);
  futex_wake(&wake_);
  if (thread_.joinable()) thread_.join();
  for (std::unique_ptr<Device>& device : devices_) {
    if (device == nullptr) continue;
    for (std::unique_ptr<Channel>& channel : device->channels) {
      if (channel == nullptr) continue;
      if (!drained) {
        word(channel->done).store(channel->generation, std::memory_order_release);
        channel->words.leak();
        for (auto& block : channel->staging) block->leak();
      }
      for (DeviceEvent event : {channel->copied, channel->finished, channel->consumed}) {
        if (event != nullptr) (void)device->driver->event_destroy(event);
      }
    }
    if (device->side != nullptr) (void)device->driver->stream_destroy(device->side);
  }
  if (!drained) {
    for (auto& [key, copy] : biases_) copy->block.leak();
  }
  biases_.clear();
}

// True when everything enqueued was served and copied back.
bool ExpertsDevice::drain() {
  uint64_t before = num_served_.load();
  Clock::time_point progress = Clock::now();
  bool drained = true;
  while (outstanding_.load(std::memory_order_acquire) > 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    abandon_failed();
    const uint64_t now = num_served_.load();
    if (now != before) {
      before = now;
      progress = Clock::now();
    }
    if (Clock::now() - progress > kDrainPatience) {
      drained = false;
      break;
    }
  }
  for (std::unique_ptr<Device>& device : devices_) {
    if (device == nullptr) continue;
    if (!drained) continue;  // synchronizing might not return
    if (device->side != nullptr) (void)device->driver->stream_synchronize(device->side);
    for (std::unique_ptr<Channel>& channel : device->channels) {
      if (channel != nullptr) (void)device->driver->event_synchronize(channel->consumed);
    }
  }
  return drained;
}

// Forgets calls whose stream failed before it came to them.
void ExpertsDevice::abandon_failed() {
  for (std::unique_ptr<Device>& device : devices_) {
    if (device == nullptr) continue;
    for (std::unique_ptr<Channel>& channel : device->channels) {
      if (channel == nullptr) continue;
      std::lock_guard<std::mutex> lock(channel->enqueue_mutex);
      bool done = false;
      if (channel->open || device->driver->event_query(channel->consumed, &done).ok()) continue;
      std::lock_guard<std::mutex> calls_lock(channel->calls_mutex);
      while (!channel->calls.empty() &&
             !reached(word(channel->ready).load(std::memory_order_acquire),
                      channel->calls.back().generation)) {
        channel->calls.pop_back();
        outstanding_.fetch_sub(1, std::memory_order_release);
      }
    }
  }
}

Status ExpertsDevice::find_device(int ordinal, Device** result) {
  if (ordinal < 0 || ordinal >= kMaxDevices) {
    return Status::error("device " + std::to_string(ordinal) + "; at most " +
                         std::to_string(kMaxDevices) + " are supported");
  }
  std::unique_ptr<Device>& device = devices_[ordinal];
  if (device == nullptr) {
    auto made = std::make_unique<Device>();
    made->ordinal = ordinal;
    Status status = make_driver_(ordinal, &made->driver);
    if (!status.ok()) return status;
    made->signal = forced_signal_.value_or(
        made->driver->supports_values() ? DeviceSignal::kValues : DeviceSignal::kHostFunctions);
    if (made->signal == DeviceSignal::kValues && !made->driver->supports_values()) {
      return Status::error("this driver has no stream memory operations; use host functions");
    }
    if (made->signal == DeviceSignal::kHostFunctions) {
      status = made->driver->stream_create(&made->side);
      if (!status.ok()) return status;
    } else if (!thread_.joinable()) {
      sigset_t all, before;  // signals belong to the interpreter's threads
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      thread_ = std::thread([this] { thread_main(); });
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    device = std::move(made);
  }
  *result = device.get();
  return {};
}

Status ExpertsDevice::find_channel(const DevicePlace& place, Channel** result) {
  if (place.slot < 0 || place.slot >= kMaxSlots) {
    return Status::error("slot " + std::to_string(place.slot) + "; wanted 0 to " +
                         std::to_string(kMaxSlots - 1));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  Device* device = nullptr;
  Status status = find_device(place.ordinal, &device);
  if (!status.ok()) return status;
  std::unique_ptr<Channel>& channel = device->channels[place.slot];
  if (channel == nullptr) {
    auto made = std::make_unique<Channel>();
    made->owner = this;
    made->device = device;
    made->slot = place.slot;
    status = made->words.allocate(device->driver.get(), 2 * kCacheLine);
    if (status.ok()) status = device->driver->event_create(&made->consumed);
    if (status.ok()) status = device->driver->event_create(&made->copied);
    if (status.ok()) status = device->driver->event_create(&made->finished);
    if (!status.ok()) {
      for (DeviceEvent event : {made->copied, made->finished, made->consumed}) {
        if (event != nullptr) (void)device->driver->event_destroy(event);
      }
      return status;
    }
    made->ready = reinterpret_cast<uint32_t*>(made->words.data);
    made->done = reinterpret_cast<uint32_t*>(made->words.data + kCacheLine);
    channel = std::move(made);
    if (device->signal == DeviceSignal::kValues) {
      const int index = num_channels_.load(std::memory_order_relaxed);
      channels_[index].store(channel.get(), std::memory_order_release);
      num_channels_.store(index + 1, std::memory_order_release);
    }
  }
  *result = channel.get();
  return {};
}

Status ExpertsDevice::submit(const DevicePlace& place, std::shared_ptr<HostStore> store,
                             const ExpertsCall& call) {
  constexpr const char* kOp = "experts_submit: ";
  if (closing_.load()) return Status::error(std::string(kOp) + "the runtime is being closed");
  Status status = take_error();
  if (!status.ok()) return status;
  Channel* channel = nullptr;
  status = find_channel(place, &channel);
  if (!status.ok()) return Status::error(kOp + status.message());
  DeviceDriver& driver = *channel->device->driver;

  std::lock_guard<std::mutex> lock(channel->enqueue_mutex);
  if (!channel->broken.ok()) return channel->broken;
  const int64_t hidden = store->layer(call.layer).hidden;
  const size_t x_bytes =
      static_cast<size_t>(call.num_tokens * hidden) * (call.x_type == ActivationType::kF32 ? 4 : 2);
  const size_t ids_bytes = static_cast<size_t>(call.num_tokens * call.per_token) * sizeof(int32_t);
  const size_t y_bytes = static_cast<size_t>(call.num_tokens * hidden) * sizeof(float);
  // Operands that lie one after the other are copied in one piece: small copies cost by number.
  const char* device_x = static_cast<const char*>(call.x);
  const bool packed = reinterpret_cast<const char*>(call.expert_ids) == device_x + x_bytes &&
                      reinterpret_cast<const char*>(call.weights) == device_x + x_bytes + ids_bytes;
  Layout layout;
  const size_t x = layout.add(packed ? x_bytes + 2 * ids_bytes : x_bytes);
  const size_t ids = packed ? x + x_bytes : layout.add(ids_bytes);
  const size_t weights = packed ? ids + ids_bytes : layout.add(ids_bytes);
  const size_t y = layout.add(y_bytes);
  if (channel->staging.empty() || channel->staging.back()->bytes < layout.total()) {
    auto block = std::make_unique<Block>();
    const size_t last = channel->staging.empty() ? 0 : channel->staging.back()->bytes;
    status = block->allocate(&driver, std::max(layout.total(), 2 * last));
    if (!status.ok()) return Status::error(kOp + status.message());
    channel->staging.push_back(std::move(block));
  }
  char* base = channel->staging.back()->data;

  Call entry;
  entry.channel = channel;
  entry.generation = channel->generation + 1;
  entry.call = call;
  entry.call.x = base + x;
  entry.call.expert_ids = reinterpret_cast<const int32_t*>(base + ids);
  entry.call.weights = reinterpret_cast<const float*>(base + weights);
  entry.call.y = reinterpret_cast<float*>(base + y);
  // A program that failed half-way never waited: the host may still be reading the staging.
  if (channel->open) status = await_host(channel, place.stream);
  if (status.ok() && channel->stream != nullptr && channel->stream != place.stream) {
    status = driver.stream_wait_event(place.stream, channel->consumed);
  }
  const size_t first_bytes = packed ? x_bytes + 2 * ids_bytes : x_bytes;
  if (status.ok()) status = driver.copy_to_host_async(base + x, call.x, first_bytes, place.stream);
  if (status.ok() && !packed) {
    status = driver.copy_to_host_async(base + ids, call.expert_ids, ids_bytes, place.stream);
  }
  if (status.ok() && !packed) {
    status = driver.copy_to_host_async(base + weights, call.weights, ids_bytes, place.stream);
  }
  if (status.ok() && call.gate_bias != nullptr) {
    entry.store = store;
    status = stage_biases(channel, *store, call, place.stream, &entry);
  }
  if (!status.ok()) return Status::error(kOp + status.message());
  entry.store = std::move(store);

  Call* queued = nullptr;
  {
    std::lock_guard<std::mutex> calls_lock(channel->calls_mutex);
    channel->calls.push_back(std::move(entry));
    queued = &channel->calls.back();
  }
  outstanding_.fetch_add(1, std::memory_order_seq_cst);
  status = signal_host(channel, place.stream, queued);
  if (!status.ok()) return Status::error(kOp + status.message());
  channel->generation += 1;
  channel->open = true;
  channel->run_id = place.run_id;
  channel->num_tokens = call.num_tokens;
  channel->hidden = hidden;
  channel->y = reinterpret_cast<float*>(base + y);
  channel->stream = place.stream;
  if (asleep_.load(std::memory_order_seq_cst)) {
    wake_.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(&wake_);
  }
  return {};
}

Status ExpertsDevice::stage_biases(Channel* channel, const HostStore& store,
                                   const ExpertsCall& call, DeviceStream stream, Call* entry) {
  const ExpertLayerSpec& layer = store.layer(call.layer);
  const size_t bytes =
      static_cast<size_t>(layer.num_experts) * static_cast<size_t>(layer.intermediate) * 4;
  std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<BiasCopy>& copy = biases_[{&store, {channel->device->ordinal, call.layer}}];
  // Another store may have come to lie where one was.
  if (copy != nullptr && (copy->lost.load() || copy->store.lock().get() != &store)) copy.reset();
  if (copy == nullptr) {
    auto made = std::make_unique<BiasCopy>();
    DeviceDriver& driver = *channel->device->driver;
    Status status = made->block.allocate(&driver, 2 * align_up(bytes, kCacheLine));
    if (!status.ok()) return status;
    char* gate = made->block.data;
    char* up = gate + align_up(bytes, kCacheLine);
    status = driver.copy_to_host_async(gate, call.gate_bias, bytes, stream);
    if (status.ok()) status = driver.copy_to_host_async(up, call.up_bias, bytes, stream);
    if (!status.ok()) {
      made->block.leak();  // the first of the copies may be under way
      return status;
    }
    made->gate = reinterpret_cast<const float*>(gate);
    made->up = reinterpret_cast<const float*>(up);
    made->channel = channel;
    made->generation = entry->generation;
    made->store = entry->store;
    copy = std::move(made);
  }
  entry->biases = copy.get();
  entry->call.gate_bias = copy->gate;
  entry->call.up_bias = copy->up;
  return {};
}

Status ExpertsDevice::signal_host(Channel* channel, DeviceStream stream, Call* entry) {
  Device& device = *channel->device;
  DeviceDriver& driver = *device.driver;
  if (device.signal == DeviceSignal::kValues) {
    Status status = driver.write_value32(stream, channel->ready, entry->generation);
    if (!status.ok()) withdraw_last(channel);
    return status;
  }
  std::lock_guard<std::mutex> lock(device.side_mutex);
  Status status = driver.event_record(channel->copied, stream);
  if (status.ok()) status = driver.stream_wait_event(device.side, channel->copied);
  if (status.ok()) status = driver.launch_host_func(device.side, host_function, entry);
  if (!status.ok()) {
    withdraw_last(channel);
    return status;
  }
  status = driver.event_record(channel->finished, device.side);
  // The host function will run, but nothing can wait for it.
  if (!status.ok()) channel->broken = status;
  return status;
}

void ExpertsDevice::withdraw_last(Channel* channel) {
  std::lock_guard<std::mutex> lock(channel->calls_mutex);
  channel->calls.pop_back();
  outstanding_.fetch_sub(1, std::memory_order_release);
}

// Makes the stream wait until the slot's last call was served.
Status ExpertsDevice::await_host(Channel* channel, DeviceStream stream) {
  Device& device = *channel->device;
  if (device.signal == DeviceSignal::kValues) {
    return device.driver->wait_value32(stream, channel->done, channel->generation);
  }
  return device.driver->stream_wait_event(stream, channel->finished);
}

Status ExpertsDevice::wait(const DevicePlace& place, int64_t num_tokens, int64_t hidden, float* y) {
  constexpr const char* kOp = "experts_wait: ";
  Channel* channel = nullptr;
  Status status = find_channel(place, &channel);
  if (!status.ok()) return Status::error(kOp + status.message());
  DeviceDriver& driver = *channel->device->driver;
  std::lock_guard<std::mutex> lock(channel->enqueue_mutex);
  const std::string where =
      "slot " + std::to_string(place.slot) + " of device " + std::to_string(place.ordinal);
  if (!channel->open) {
    return Status::error(kOp + where +
                         " has no submitted call: each experts_submit is good for "
                         "one wait of its slot");
  }
  if (channel->run_id != place.run_id) {
    return Status::error(kOp + where +
                         " was used by another program meanwhile: programs that run "
                         "at once on a device need different slots");
  }
  if (channel->num_tokens != num_tokens || channel->hidden != hidden) {
    return Status::error(kOp + ("the result was asked for as [" + std::to_string(num_tokens)) +
                         ", " + std::to_string(hidden) + "], but [" +
                         std::to_string(channel->num_tokens) + ", " +
                         std::to_string(channel->hidden) + "] was submitted to " + where);
  }
  status = await_host(channel, place.stream);
  if (status.ok()) {
    status = driver.copy_to_device_async(
        y, channel->y, static_cast<size_t>(num_tokens * hidden) * sizeof(float), place.stream);
  }
  if (status.ok()) status = driver.event_record(channel->consumed, place.stream);
  if (!status.ok()) return Status::error(kOp + status.message());
  channel->open = false;
  channel->stream = place.stream;
  return {};
}

void ExpertsDevice::host_function(void* argument) {
  Call* call = static_cast<Call*>(argument);
  Channel* channel = call->channel;
  const uint32_t generation = call->generation;
  word(channel->ready).store(generation, std::memory_order_release);
  channel->owner->serve(channel, generation);
}

// Runs the call that was signalled. Earlier ones that never were belong to a stream that failed
// before it came to them.
void ExpertsDevice::serve(Channel* channel, uint32_t generation) {
  Call* call = nullptr;
  std::vector<Call> dropped;
  {
    std::lock_guard<std::mutex> lock(channel->calls_mutex);
    while (!channel->calls.empty() && channel->calls.front().generation != generation) {
      dropped.push_back(std::move(channel->calls.front()));
      channel->calls.pop_front();
    }
    if (!channel->calls.empty()) call = &channel->calls.front();
  }
  if (call != nullptr) {
    const Clock::time_point begin = Clock::now();
    Status status = run(channel, *call);
    if (!status.ok()) {
      const int64_t count = call->call.num_tokens * call->store->layer(call->call.layer).hidden;
      std::fill(call->call.y, call->call.y + count, std::nanf(""));
      note_error(status);
    }
    experts_ns_.fetch_add(nanoseconds(Clock::now() - begin), std::memory_order_relaxed);
  }
  word(channel->done).store(generation, std::memory_order_release);
  // The stream goes on; the rest is for the next call.
  std::shared_ptr<HostStore> last;
  if (call != nullptr) {
    std::lock_guard<std::mutex> lock(channel->calls_mutex);
    last = std::move(call->store);
    channel->calls.pop_front();
  }
  channel->served.store(generation, std::memory_order_release);
  num_served_.fetch_add(1, std::memory_order_relaxed);
  const size_t gone = dropped.size() + (call != nullptr ? 1 : 0);
  outstanding_.fetch_sub(static_cast<uint32_t>(gone), std::memory_order_release);
}

Status ExpertsDevice::run(Channel* channel, const Call& call) {
  if (call.biases != nullptr) {
    BiasCopy& copy = *call.biases;
    if (reached(word(copy.channel->ready).load(std::memory_order_acquire), copy.generation)) {
      copy.arrived.store(true, std::memory_order_relaxed);
    } else if (!copy.arrived.load(std::memory_order_relaxed)) {
      copy.lost.store(true);
      return Status::error("the expert biases of MoE layer " + std::to_string(call.call.layer) +
                           " never arrived: the stream that copied them failed");
    }
  }
  Pool& pool = runtime_.pool();
  JobShape shape;
  JobSlot* slot = pool.acquire();
  Status status = channel->job.plan(runtime_, *call.store, call.call, &slot->scratch, &shape);
  if (status.ok() && shape.total() > 0) {
    if (channel->job.alone()) {
      pool.run_alone(&channel->job, shape);
    } else {
      pool.run(slot, &channel->job, shape);
    }
  }
  pool.release(slot);
  return status;
}

void ExpertsDevice::thread_main() {
  pthread_setname_np(pthread_self(), "jaxmoe-device");
  Clock::time_point last_work = Clock::now(), idle_from = last_work;
  while (!stop_.load(std::memory_order_acquire)) {
    const uint32_t seen = wake_.load(std::memory_order_seq_cst);
    bool worked = false;
    const int num_channels = num_channels_.load(std::memory_order_acquire);
    for (int i = 0; i < num_channels; ++i) {
      Channel* channel = channels_[i].load(std::memory_order_acquire);
      const uint32_t ready = word(channel->ready).load(std::memory_order_acquire);
      if (ready == channel->served.load(std::memory_order_relaxed)) continue;
      idle_ns_.fetch_add(nanoseconds(Clock::now() - idle_from), std::memory_order_relaxed);
      serve(channel, ready);
      last_work = idle_from = Clock::now();
      worked = true;
    }
    if (worked) continue;
    if (outstanding_.load(std::memory_order_seq_cst) > 0) {
      for (int i = 0; i < 32; ++i) cpu_pause();
      if (Clock::now() - last_work > kHotPatience) std::this_thread::sleep_for(kNap);
      continue;
    }
    for (int i = 0; i < 32; ++i) cpu_pause();
    idle_from = Clock::now();
    if (idle_from - last_work < kIdlePatience) continue;
    // The next call wakes this thread while the device is still busy with what comes before it.
    asleep_.store(true, std::memory_order_seq_cst);
    if (outstanding_.load(std::memory_order_seq_cst) == 0 && !stop_.load()) {
      futex_wait(&wake_, seen);
    }
    asleep_.store(false, std::memory_order_seq_cst);
    last_work = idle_from = Clock::now();
  }
}

void ExpertsDevice::note_error(const Status& status) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!error_) error_ = Status::error("experts of an earlier step: " + status.message());
}

Status ExpertsDevice::take_error() {
  std::lock_guard<std::mutex> lock(mutex_);
  Status status = error_.value_or(Status());
  error_.reset();
  return status;
}

DeviceStats ExpertsDevice::stats() const {
  DeviceStats stats;
  stats.calls = num_served_.load();
  stats.experts_s = static_cast<double>(experts_ns_.load()) * 1e-9;
  stats.idle_s = static_cast<double>(idle_ns_.load()) * 1e-9;
  return stats;
}

std::string ExpertsDevice::describe() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string text;
  for (const std::unique_ptr<Device>& device : devices_) {
    if (device == nullptr) continue;
    if (!text.empty()) text += "; ";
    text += "hand-over to device " + std::to_string(device->ordinal) + " by " +
            device_signal_name(device->signal);
    if (device->signal == DeviceSignal::kHostFunctions) {
      text += device->driver->supports_values() ? " (asked for)"
                                                : " (the driver has no stream memory operations)";
    }
  }
  return text;
}

}  // namespace jaxmoe

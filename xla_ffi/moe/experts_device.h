// experts_submit and experts_wait for activations that lie on a device, without the enqueuing
// thread ever waiting for it: everything happens in the order of the device's own stream.
//
//   submit   copies x, ids and weights into page-locked staging, then signals the host
//   (host)   one thread, or the driver's, runs the job on the pool and signals back
//   wait     the stream waits for that signal, then copies y to the device
//
// A call belongs to a slot of its device (the microbatch). A slot's calls follow one another in
// stream order, so one staging block a slot is enough however many steps have been enqueued. The
// device's arrays are touched on the caller's stream only: whoever owns them may reuse them in
// stream order.
//
// What fails on the host after the call was enqueued (an expert id out of range) is kept and
// returned by the next submit; that call's y is NaN.
#ifndef JAXMOE_MOE_EXPERTS_DEVICE_H_
#define JAXMOE_MOE_EXPERTS_DEVICE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "moe/experts.h"
#include "runtime/cpu_runtime.h"
#include "runtime/device_driver.h"
#include "runtime/host_store.h"
#include "runtime/status.h"

namespace jaxmoe {

// How stream and host tell each other.
enum class DeviceSignal {
  kValues,         // the stream writes and awaits words of page-locked memory; one thread polls
  kHostFunctions,  // the driver calls the host from a side stream, which an event joins
};
const char* device_signal_name(DeviceSignal signal);

// Where in a program's enqueuing a call is made.
struct DevicePlace {
  int ordinal = 0;
  int slot = 0;
  int64_t run_id = 0;  // of the execution: its wait must come from the same one
  DeviceStream stream = nullptr;
};

struct DeviceStats {
  uint64_t calls = 0;
  double experts_s = 0;  // of jobs on the pool
  double idle_s = 0;     // with calls enqueued, none of them signalled yet (kValues only)
};

class ExpertsDevice {
 public:
  static constexpr int kMaxDevices = 8;
  static constexpr int kMaxSlots = 8;
  // The slot of calls that submit and wait in one.
  static constexpr int kWholeSlot = kMaxSlots - 1;
  using MakeDriver = std::function<Status(int ordinal, std::shared_ptr<DeviceDriver>*)>;

  // Without `signal`: values where the driver supports them.
  ExpertsDevice(CpuRuntime& runtime, MakeDriver make_driver,
                std::optional<DeviceSignal> signal = std::nullopt);
  // Serves what was enqueued first. Streams that no longer make progress are let go after some
  // seconds; their memory is then not given back, for they may still write to it.
  ~ExpertsDevice();
  ExpertsDevice(const ExpertsDevice&) = delete;
  ExpertsDevice& operator=(const ExpertsDevice&) = delete;

  // `call` has device addresses; y is ignored. The biases of a layer are constants: they are copied
  // at its first call. The store is kept until the job is done.
  Status submit(const DevicePlace& place, std::shared_ptr<HostStore> store,
                const ExpertsCall& call);
  // Copies the result of the slot's submitted call to y [num_tokens, hidden] on the device.
  Status wait(const DevicePlace& place, int64_t num_tokens, int64_t hidden, float* y);

  // What failed since, and was not returned by a submit yet.
  Status take_error();
  DeviceStats stats() const;
  // How it signals, and why: for the start-up report. Empty before the first call.
  std::string describe() const;

 private:
  struct Block;
  struct BiasCopy;
  struct Call;
  struct Channel;
  struct Device;

  Status find_device(int ordinal, Device** device);
  Status find_channel(const DevicePlace& place, Channel** channel);
  Status stage_biases(Channel* channel, const HostStore& store, const ExpertsCall& call,
                      DeviceStream stream, Call* entry);
  Status signal_host(Channel* channel, DeviceStream stream, Call* entry);
  Status await_host(Channel* channel, DeviceStream stream);
  void withdraw_last(Channel* channel);

  void serve(Channel* channel, uint32_t generation);
  Status run(Channel* channel, const Call& call);
  void note_error(const Status& status);
  static void host_function(void* call);
  void thread_main();
  bool drain();
  void abandon_failed();

  CpuRuntime& runtime_;
  const MakeDriver make_driver_;
  const std::optional<DeviceSignal> forced_signal_;
  mutable std::mutex mutex_;  // guards devices_, error_, biases_ and the making of channels
  std::unique_ptr<Device> devices_[kMaxDevices];
  std::optional<Status> error_;
  // Of a device's layer of a store, by the store's address.
  std::map<std::pair<const HostStore*, std::pair<int, int>>, std::unique_ptr<BiasCopy>> biases_;
  std::atomic<Channel*> channels_[kMaxDevices * kMaxSlots] = {};
  std::atomic<int> num_channels_{0};
  std::atomic<uint32_t> outstanding_{0};  // calls enqueued and not served
  std::atomic<uint32_t> wake_{0};
  std::atomic<bool> asleep_{false}, closing_{false}, stop_{false};
  std::atomic<uint64_t> num_served_{0};
  std::atomic<int64_t> experts_ns_{0}, idle_ns_{0};
  std::thread thread_;  // started with the first device that signals by values
};

}  // namespace jaxmoe

#endif  // JAXMOE_MOE_EXPERTS_DEVICE_H_

// The objects that compiled programs name by id.
#ifndef JAXMOE_HANDLERS_REGISTRIES_H_
#define JAXMOE_HANDLERS_REGISTRIES_H_

#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "moe/experts_device.h"
#include "moe/experts_queue.h"
#include "prefill/slot_ring.h"
#include "runtime/cpu_runtime.h"
#include "runtime/host_store.h"
#include "runtime/registry.h"

namespace jaxmoe {

struct NativeRuntime {
  // signal: how devices are told, where it is not to be the best they have.
  explicit NativeRuntime(std::shared_ptr<CpuRuntime> cpu,
                         std::optional<DeviceSignal> signal = std::nullopt)
      : cpu(std::move(cpu)), experts(*this->cpu), device_signal(signal) {}

  // Made when a device's program first asks for it.
  ExpertsDevice& device_experts();
  // nullptr before.
  ExpertsDevice* device_experts_if_any() {
    std::lock_guard<std::mutex> lock(device_mutex);
    return device.get();
  }

  std::shared_ptr<CpuRuntime> cpu;
  ExpertsQueue experts;  // ends before the pool it runs on
  const std::optional<DeviceSignal> device_signal;
  std::mutex device_mutex;
  std::unique_ptr<ExpertsDevice> device;  // likewise
};

// What a program's ring id names: a ring, or one ring a device where a program runs on several.
struct SlotRingGroup {
  static constexpr int kAnyDevice = -1;
  std::vector<std::pair<int, std::shared_ptr<SlotRing>>> rings;  // by device ordinal

  SlotRing* find(int device_ordinal) const {
    for (const auto& [ordinal, ring] : rings) {
      if (ordinal == device_ordinal || ordinal == kAnyDevice) return ring.get();
    }
    return nullptr;
  }
};

// Never destroyed: XLA's threads may still run handlers while the process exits.
Registry<NativeRuntime>& runtimes();
Registry<HostStore>& stores();
Registry<SlotRingGroup>& slot_rings();

}  // namespace jaxmoe

#endif  // JAXMOE_HANDLERS_REGISTRIES_H_

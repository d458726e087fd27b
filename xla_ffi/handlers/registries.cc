#include "handlers/registries.h"

#include "runtime/cuda_driver.h"

namespace jaxmoe {

ExpertsDevice& NativeRuntime::device_experts() {
  std::lock_guard<std::mutex> lock(device_mutex);
  if (device == nullptr) {
    device = std::make_unique<ExpertsDevice>(*cpu, create_cuda_driver, device_signal);
  }
  return *device;
}

Registry<NativeRuntime>& runtimes() {
  static auto* registry = new Registry<NativeRuntime>();
  return *registry;
}

Registry<HostStore>& stores() {
  static auto* registry = new Registry<HostStore>();
  return *registry;
}

Registry<SlotRingGroup>& slot_rings() {
  static auto* registry = new Registry<SlotRingGroup>();
  return *registry;
}

}  // namespace jaxmoe

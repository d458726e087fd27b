#include "handlers/registries.h"

namespace jaxmoe {

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

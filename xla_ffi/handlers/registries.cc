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

}  // namespace jaxmoe

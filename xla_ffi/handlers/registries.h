// The objects that compiled programs name by id.
#ifndef JAXMOE_HANDLERS_REGISTRIES_H_
#define JAXMOE_HANDLERS_REGISTRIES_H_

#include <memory>

#include "moe/experts_queue.h"
#include "runtime/cpu_runtime.h"
#include "runtime/host_store.h"
#include "runtime/registry.h"

namespace jaxmoe {

struct NativeRuntime {
  explicit NativeRuntime(std::shared_ptr<CpuRuntime> cpu)
      : cpu(std::move(cpu)), experts(*this->cpu) {}
  std::shared_ptr<CpuRuntime> cpu;
  ExpertsQueue experts;  // ends before the pool it runs on
};

// Never destroyed: XLA's threads may still run handlers while the process exits.
Registry<NativeRuntime>& runtimes();
Registry<HostStore>& stores();

}  // namespace jaxmoe

#endif  // JAXMOE_HANDLERS_REGISTRIES_H_

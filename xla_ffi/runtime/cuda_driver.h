// DeviceDriver on an NVIDIA GPU: entry points of libcuda.so.1, found when asked for. No CUDA
// headers or libraries are needed to build.
#ifndef JAXMOE_RUNTIME_CUDA_DRIVER_H_
#define JAXMOE_RUNTIME_CUDA_DRIVER_H_

#include <memory>

#include "runtime/device_driver.h"
#include "runtime/status.h"

namespace jaxmoe {

// Of device `ordinal`, in its primary context: the one that XLA works in, so its streams and memory
// may be used. The context is current only inside a call, whatever the calling thread had before.
// The error says what is missing: the library, an entry point (a driver too old), or the device.
Status create_cuda_driver(int ordinal, std::shared_ptr<DeviceDriver>* driver);

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_CUDA_DRIVER_H_

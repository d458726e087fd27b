// How fast a device's copy engine moves page-locked memory: the rate that streaming is held
// against.
#ifndef JAXMOE_BENCH_COPY_RATE_H_
#define JAXMOE_BENCH_COPY_RATE_H_

#include <cstddef>
#include <vector>

#include "runtime/device_driver.h"
#include "runtime/status.h"

namespace jaxmoe {

// Bytes per second of each of `repeats` copies of all `bytes`, one after the other, to the device
// or from it.
Status copy_rate(DeviceDriver& driver, void* device, void* host, size_t bytes, int repeats,
                 bool to_device, std::vector<double>* rates);

}  // namespace jaxmoe

#endif  // JAXMOE_BENCH_COPY_RATE_H_

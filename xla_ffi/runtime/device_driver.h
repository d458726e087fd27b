// What only a device has, as one small table: streams, events, asynchronous copies, page-locking.
//
// Two implementations: the CUDA driver library, found at run time (cuda_driver.h), and a stand-in
// on the CPU (host_driver.h), which drives the same code in tests and on the CPU platform. The
// semantics are CUDA's: a stream runs its operations in order; waiting for an event means its last
// record at the time of the call, and one that was never recorded counts as done. All calls may be
// made from any thread, and say in their error which call failed and why.
#ifndef JAXMOE_RUNTIME_DEVICE_DRIVER_H_
#define JAXMOE_RUNTIME_DEVICE_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "runtime/status.h"

namespace jaxmoe {

using DeviceStream = void*;  // CUstream
using DeviceEvent = void*;   // CUevent
using HostFunction = void (*)(void*);

// `rows` pieces of `width` bytes; the next one begins a pitch further.
struct Copy2d {
  void* dst = nullptr;
  size_t dst_pitch = 0;
  const void* src = nullptr;
  size_t src_pitch = 0;
  size_t width = 0;
  size_t rows = 0;
};

class DeviceDriver {
 public:
  virtual ~DeviceDriver() = default;

  // One line for reports: which device, through which library.
  virtual std::string describe() const = 0;
  // Whether device memory is ordinary memory of this process.
  virtual bool is_host() const = 0;
  virtual Status memory_info(int64_t* free_bytes, int64_t* total_bytes) = 0;

  // Runs independently of every other stream.
  virtual Status stream_create(DeviceStream* stream) = 0;
  // What was enqueued still runs.
  virtual Status stream_destroy(DeviceStream stream) = 0;
  virtual Status stream_synchronize(DeviceStream stream) = 0;
  virtual Status stream_wait_event(DeviceStream stream, DeviceEvent event) = 0;

  virtual Status event_create(DeviceEvent* event) = 0;
  virtual Status event_destroy(DeviceEvent event) = 0;
  virtual Status event_record(DeviceEvent event, DeviceStream stream) = 0;
  virtual Status event_synchronize(DeviceEvent event) = 0;
  virtual Status event_query(DeviceEvent event, bool* done) = 0;
  // Of two events that are done.
  virtual Status event_elapsed(DeviceEvent start, DeviceEvent end, double* seconds) = 0;

  // Asynchronous where the host's memory is page-locked; else a CUDA driver copies it through a
  // buffer of its own first, at a fraction of the speed, while the caller waits.
  virtual Status copy_to_device_async(void* dst, const void* src, size_t bytes,
                                      DeviceStream stream) = 0;
  virtual Status copy_to_device_2d_async(const Copy2d& copy, DeviceStream stream) = 0;
  virtual Status copy_to_host_async(void* dst, const void* src, size_t bytes,
                                    DeviceStream stream) = 0;

  // Page-locks memory of this process, for all devices of it. A copy may not reach from one
  // registered range into the next. read_only: the mapping cannot be written.
  virtual Status register_host(void* address, size_t bytes, bool read_only) = 0;
  virtual Status unregister_host(void* address, size_t bytes) = 0;

  // The function may not call the driver. It is not called once an earlier operation has failed.
  virtual Status launch_host_func(DeviceStream stream, HostFunction function, void* argument) = 0;

  // The stream writes a word of registered memory, or waits until it has reached the value (in
  // arithmetic modulo 2^32). Only where supports_values().
  virtual bool supports_values() const = 0;
  virtual Status write_value32(DeviceStream stream, uint32_t* address, uint32_t value) = 0;
  virtual Status wait_value32(DeviceStream stream, uint32_t* address, uint32_t value) = 0;
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_DEVICE_DRIVER_H_

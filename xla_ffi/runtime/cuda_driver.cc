#include "runtime/cuda_driver.h"

#include <dlfcn.h>

#include <mutex>

namespace jaxmoe {
namespace {

// The part of cuda.h that is used here: its types and constants are the library's stable ABI.
using CUresult = int;
using CUdevice = int;
using CUcontext = void*;
using CUstream = void*;
using CUevent = void*;
using CUdeviceptr = unsigned long long;

constexpr CUresult kSuccess = 0, kNotReady = 600;
constexpr unsigned kStreamNonBlocking = 1;  // does not wait for the legacy default stream
constexpr unsigned kEventBlockingSync = 1;  // waiters sleep, the CPU is for the experts
constexpr unsigned kRegisterPortable = 1, kRegisterDeviceMap = 2, kRegisterReadOnly = 8;
constexpr unsigned kWaitValueGeq = 0;
constexpr int kAttributeAsyncEngines = 40, kAttributeMajor = 75, kAttributeMinor = 76;
constexpr int kAttributeReadOnlyRegister = 113;
constexpr int kMemoryHost = 1, kMemoryDevice = 2;

struct Memcpy2d {  // CUDA_MEMCPY2D
  size_t src_x, src_y;
  int src_type;
  const void* src_host;
  CUdeviceptr src_device;
  void* src_array;
  size_t src_pitch;
  size_t dst_x, dst_y;
  int dst_type;
  void* dst_host;
  CUdeviceptr dst_device;
  void* dst_array;
  size_t dst_pitch;
  size_t width, height;
};
static_assert(sizeof(Memcpy2d) == 128);

// One line an entry point: the member, the exported symbol, its parameters.
#define JAXMOE_CUDA_ENTRIES(X)                                                          \
  X(init, "cuInit", unsigned)                                                           \
  X(driver_version, "cuDriverGetVersion", int*)                                         \
  X(error_name, "cuGetErrorName", CUresult, const char**)                               \
  X(error_string, "cuGetErrorString", CUresult, const char**)                           \
  X(device_count, "cuDeviceGetCount", int*)                                             \
  X(device_get, "cuDeviceGet", CUdevice*, int)                                          \
  X(device_name, "cuDeviceGetName", char*, int, CUdevice)                               \
  X(device_attribute, "cuDeviceGetAttribute", int*, int, CUdevice)                      \
  X(context_retain, "cuDevicePrimaryCtxRetain", CUcontext*, CUdevice)                   \
  X(context_release, "cuDevicePrimaryCtxRelease_v2", CUdevice)                          \
  X(context_current, "cuCtxGetCurrent", CUcontext*)                                     \
  X(context_push, "cuCtxPushCurrent_v2", CUcontext)                                     \
  X(context_pop, "cuCtxPopCurrent_v2", CUcontext*)                                      \
  X(memory_info, "cuMemGetInfo_v2", size_t*, size_t*)                                   \
  X(stream_create, "cuStreamCreate", CUstream*, unsigned)                               \
  X(stream_destroy, "cuStreamDestroy_v2", CUstream)                                     \
  X(stream_synchronize, "cuStreamSynchronize", CUstream)                                \
  X(stream_wait_event, "cuStreamWaitEvent", CUstream, CUevent, unsigned)                \
  X(event_create, "cuEventCreate", CUevent*, unsigned)                                  \
  X(event_destroy, "cuEventDestroy_v2", CUevent)                                        \
  X(event_record, "cuEventRecord", CUevent, CUstream)                                   \
  X(event_synchronize, "cuEventSynchronize", CUevent)                                   \
  X(event_query, "cuEventQuery", CUevent)                                               \
  X(event_elapsed, "cuEventElapsedTime", float*, CUevent, CUevent)                      \
  X(copy_to_device, "cuMemcpyHtoDAsync_v2", CUdeviceptr, const void*, size_t, CUstream) \
  X(copy_to_host, "cuMemcpyDtoHAsync_v2", void*, CUdeviceptr, size_t, CUstream)         \
  X(copy_2d, "cuMemcpy2DAsync_v2", const Memcpy2d*, CUstream)                           \
  X(register_host, "cuMemHostRegister_v2", void*, size_t, unsigned)                     \
  X(unregister_host, "cuMemHostUnregister", void*)                                      \
  X(device_pointer, "cuMemHostGetDevicePointer_v2", CUdeviceptr*, void*, unsigned)      \
  X(launch_host_func, "cuLaunchHostFunc", CUstream, HostFunction, void*)

// Absent from drivers before CUDA 11.7 and from some virtual GPUs.
#define JAXMOE_CUDA_OPTIONAL_ENTRIES(X)                                                  \
  X(write_value32, "cuStreamWriteValue32_v2", CUstream, CUdeviceptr, uint32_t, unsigned) \
  X(wait_value32, "cuStreamWaitValue32_v2", CUstream, CUdeviceptr, uint32_t, unsigned)

struct Entries {
#define JAXMOE_CUDA_MEMBER(member, symbol, ...) CUresult (*member)(__VA_ARGS__) = nullptr;
  JAXMOE_CUDA_ENTRIES(JAXMOE_CUDA_MEMBER)
  JAXMOE_CUDA_OPTIONAL_ENTRIES(JAXMOE_CUDA_MEMBER)
#undef JAXMOE_CUDA_MEMBER
};

std::string describe_error(const Entries& cuda, CUresult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuda.error_name(result, &name) != kSuccess || name == nullptr) {
    return "CUDA error " + std::to_string(result);
  }
  if (cuda.error_string(result, &text) != kSuccess || text == nullptr) return name;
  return std::string(name) + " (" + text + ")";
}

Status load_entries(Entries* cuda) {
  // Never closed: the library has threads and exit handlers of its own.
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    return Status::error(std::string("no CUDA driver: libcuda.so.1 cannot be loaded (") +
                         (reason != nullptr ? reason : "no reason given") +
                         "); it comes with the NVIDIA driver");
  }
#define JAXMOE_CUDA_FIND(member, symbol, ...) \
  cuda->member = reinterpret_cast<CUresult (*)(__VA_ARGS__)>(dlsym(library, symbol));
  JAXMOE_CUDA_ENTRIES(JAXMOE_CUDA_FIND)
  JAXMOE_CUDA_OPTIONAL_ENTRIES(JAXMOE_CUDA_FIND)
#undef JAXMOE_CUDA_FIND
#define JAXMOE_CUDA_NEEDED(member, symbol, ...)                                     \
  if (cuda->member == nullptr) {                                                    \
    return Status::error(std::string("libcuda.so.1 has no ") + symbol +             \
                         ": the NVIDIA driver is older than CUDA 11.1; update it"); \
  }
  JAXMOE_CUDA_ENTRIES(JAXMOE_CUDA_NEEDED)
#undef JAXMOE_CUDA_NEEDED
  CUresult result = cuda->init(0);
  if (result != kSuccess) {
    return Status::error("cuInit failed: " + describe_error(*cuda, result));
  }
  return {};
}

// Once a process; a failure is remembered too.
Status cuda_entries(const Entries** cuda) {
  static std::once_flag once;
  static auto* entries = new Entries();
  static auto* status = new Status();
  std::call_once(once, [] { *status = load_entries(entries); });
  *cuda = entries;
  return *status;
}

CUdeviceptr device_address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

class CudaDriver final : public DeviceDriver {
 public:
  CudaDriver(const Entries& cuda, int ordinal) : cuda_(cuda), ordinal_(ordinal) {}
  ~CudaDriver() override {
    if (context_ != nullptr) (void)cuda_.context_release(device_);
  }

  Status open() {
    int count = 0;
    CUresult result = cuda_.device_count(&count);
    if (result != kSuccess) return error("cuDeviceGetCount", result);
    if (ordinal_ < 0 || ordinal_ >= count) {
      return Status::error("no CUDA device " + std::to_string(ordinal_) + ": the driver shows " +
                           std::to_string(count) + " (CUDA_VISIBLE_DEVICES counts)");
    }
    result = cuda_.device_get(&device_, ordinal_);
    if (result != kSuccess) return error("cuDeviceGet", result);
    result = cuda_.context_retain(&context_, device_);
    if (result != kSuccess) {
      context_ = nullptr;
      return error("cuDevicePrimaryCtxRetain", result);
    }
    return {};
  }

  std::string describe() const override {
    char name[128] = "?";
    int version = 0, major = 0, minor = 0, engines = 0;
    (void)cuda_.device_name(name, sizeof(name), device_);
    (void)cuda_.driver_version(&version);
    (void)cuda_.device_attribute(&major, kAttributeMajor, device_);
    (void)cuda_.device_attribute(&minor, kAttributeMinor, device_);
    (void)cuda_.device_attribute(&engines, kAttributeAsyncEngines, device_);
    return "CUDA device " + std::to_string(ordinal_) + ": " + name + ", compute capability " +
           std::to_string(major) + "." + std::to_string(minor) + ", " + std::to_string(engines) +
           " copy engines, driver for CUDA " + std::to_string(version / 1000) + "." +
           std::to_string(version % 1000 / 10);
  }
  bool is_host() const override { return false; }

  Status memory_info(int64_t* free_bytes, int64_t* total_bytes) override {
    size_t free = 0, total = 0;
    Status status = in_context("cuMemGetInfo", [&] { return cuda_.memory_info(&free, &total); });
    *free_bytes = static_cast<int64_t>(free);
    *total_bytes = static_cast<int64_t>(total);
    return status;
  }

  Status stream_create(DeviceStream* stream) override {
    return in_context("cuStreamCreate",
                      [&] { return cuda_.stream_create(stream, kStreamNonBlocking); });
  }
  Status stream_destroy(DeviceStream stream) override {
    return in_context("cuStreamDestroy", [&] { return cuda_.stream_destroy(stream); });
  }
  Status stream_synchronize(DeviceStream stream) override {
    return in_context("cuStreamSynchronize", [&] { return cuda_.stream_synchronize(stream); });
  }
  Status stream_wait_event(DeviceStream stream, DeviceEvent event) override {
    return in_context("cuStreamWaitEvent",
                      [&] { return cuda_.stream_wait_event(stream, event, 0); });
  }

  Status event_create(DeviceEvent* event) override {
    return in_context("cuEventCreate",
                      [&] { return cuda_.event_create(event, kEventBlockingSync); });
  }
  Status event_destroy(DeviceEvent event) override {
    return in_context("cuEventDestroy", [&] { return cuda_.event_destroy(event); });
  }
  Status event_record(DeviceEvent event, DeviceStream stream) override {
    return in_context("cuEventRecord", [&] { return cuda_.event_record(event, stream); });
  }
  Status event_synchronize(DeviceEvent event) override {
    return in_context("cuEventSynchronize", [&] { return cuda_.event_synchronize(event); });
  }
  Status event_query(DeviceEvent event, bool* done) override {
    *done = true;
    return in_context("cuEventQuery", [&] {
      CUresult result = cuda_.event_query(event);
      if (result != kNotReady) return result;
      *done = false;
      return kSuccess;
    });
  }
  Status event_elapsed(DeviceEvent start, DeviceEvent end, double* seconds) override {
    float milliseconds = 0;
    Status status = in_context("cuEventElapsedTime",
                               [&] { return cuda_.event_elapsed(&milliseconds, start, end); });
    *seconds = milliseconds * 1e-3;
    return status;
  }

  Status copy_to_device_async(void* dst, const void* src, size_t bytes,
                              DeviceStream stream) override {
    Status status = in_context("cuMemcpyHtoDAsync", [&] {
      return cuda_.copy_to_device(device_address(dst), src, bytes, stream);
    });
    return with_bytes(status, bytes);
  }
  Status copy_to_device_2d_async(const Copy2d& copy, DeviceStream stream) override {
    Memcpy2d args = {};
    args.src_type = kMemoryHost;
    args.src_host = copy.src;
    args.src_pitch = copy.src_pitch;
    args.dst_type = kMemoryDevice;
    args.dst_device = device_address(copy.dst);
    args.dst_pitch = copy.dst_pitch;
    args.width = copy.width;
    args.height = copy.rows;
    Status status = in_context("cuMemcpy2DAsync", [&] { return cuda_.copy_2d(&args, stream); });
    return with_bytes(status, copy.width * copy.rows);
  }
  Status copy_to_host_async(void* dst, const void* src, size_t bytes,
                            DeviceStream stream) override {
    Status status = in_context("cuMemcpyDtoHAsync", [&] {
      return cuda_.copy_to_host(dst, device_address(src), bytes, stream);
    });
    return with_bytes(status, bytes);
  }

  Status register_host(void* address, size_t bytes, bool read_only) override {
    unsigned flags = kRegisterPortable | kRegisterDeviceMap;
    if (read_only) {
      int supported = 0;
      (void)cuda_.device_attribute(&supported, kAttributeReadOnlyRegister, device_);
      if (!supported) {
        return Status::error(
            "this GPU's driver cannot page-lock memory that is mapped read-only "
            "(CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED is 0)");
      }
      flags |= kRegisterReadOnly;
    }
    Status status =
        in_context("cuMemHostRegister", [&] { return cuda_.register_host(address, bytes, flags); });
    return with_bytes(status, bytes);
  }
  Status unregister_host(void* address, size_t) override {
    return in_context("cuMemHostUnregister", [&] { return cuda_.unregister_host(address); });
  }

  Status launch_host_func(DeviceStream stream, HostFunction function, void* argument) override {
    return in_context("cuLaunchHostFunc",
                      [&] { return cuda_.launch_host_func(stream, function, argument); });
  }

  bool supports_values() const override {
    return cuda_.write_value32 != nullptr && cuda_.wait_value32 != nullptr;
  }
  Status write_value32(DeviceStream stream, uint32_t* address, uint32_t value) override {
    if (!supports_values()) return no_values();
    return in_context("cuStreamWriteValue32", [&] {
      CUdeviceptr word = 0;
      CUresult result = cuda_.device_pointer(&word, address, 0);
      return result != kSuccess ? result : cuda_.write_value32(stream, word, value, 0);
    });
  }
  Status wait_value32(DeviceStream stream, uint32_t* address, uint32_t value) override {
    if (!supports_values()) return no_values();
    return in_context("cuStreamWaitValue32", [&] {
      CUdeviceptr word = 0;
      CUresult result = cuda_.device_pointer(&word, address, 0);
      return result != kSuccess ? result : cuda_.wait_value32(stream, word, value, kWaitValueGeq);
    });
  }

 private:
  Status error(const char* call, CUresult result) const {
    return Status::error(std::string(call) + " on CUDA device " + std::to_string(ordinal_) +
                         " failed: " + describe_error(cuda_, result));
  }
  static Status with_bytes(const Status& status, size_t bytes) {
    if (status.ok()) return status;
    return Status::error(status.message() + " [" + std::to_string(bytes) + " bytes]");
  }
  static Status no_values() {
    return Status::error("this CUDA driver has no stream memory operations (CUDA 11.7 has)");
  }

  template <typename Call>
  Status in_context(const char* name, Call call) const {
    CUcontext current = nullptr;
    CUresult result = cuda_.context_current(&current);
    if (result != kSuccess) return error("cuCtxGetCurrent", result);
    const bool push = current != context_;
    if (push && (result = cuda_.context_push(context_)) != kSuccess) {
      return error("cuCtxPushCurrent", result);
    }
    result = call();
    if (push) (void)cuda_.context_pop(&current);
    return result == kSuccess ? Status() : error(name, result);
  }

  const Entries& cuda_;
  const int ordinal_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
};

}  // namespace

Status create_cuda_driver(int ordinal, std::shared_ptr<DeviceDriver>* driver) {
  const Entries* cuda = nullptr;
  Status status = cuda_entries(&cuda);
  if (!status.ok()) return status;
  auto result = std::make_shared<CudaDriver>(*cuda, ordinal);
  status = result->open();
  if (status.ok()) *driver = std::move(result);
  return status;
}

}  // namespace jaxmoe

// The CPU's stand-in for a device against CUDA's semantics: order, events, rates, failures, checks.
// And that a machine without a CUDA driver is told so.
#include <dlfcn.h>

#include <cstring>
#include <numeric>
#include <thread>

#include "native_testing.h"
#include "runtime/cuda_driver.h"
#include "runtime/host_driver.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

void ok(const Status& status) { JAXMOE_CHECK(status.ok(), "%s", status.message().c_str()); }

void fails_with(const Status& status, const char* part) {
  JAXMOE_CHECK(!status.ok() && contains(status.message(), part), "'%s' should contain '%s'",
               status.message().c_str(), part);
}

DeviceStream new_stream(DeviceDriver& driver) {
  DeviceStream stream = nullptr;
  ok(driver.stream_create(&stream));
  return stream;
}

DeviceEvent new_event(DeviceDriver& driver) {
  DeviceEvent event = nullptr;
  ok(driver.event_create(&event));
  return event;
}

// A host function that blocks its stream until it is told to go on.
struct Gate {
  std::atomic<bool> open{false}, entered{false};
  static void pass(void* self) {
    auto* gate = static_cast<Gate*>(self);
    gate->entered = true;
    while (!gate->open) std::this_thread::yield();
  }
};

// Memory of device 0, which the driver table has no calls for: JAX's arrays are the slots.
class CudaMemory {
 public:
  explicit CudaMemory(size_t bytes) {
    library_ = dlopen("libcuda.so.1", RTLD_NOW);
    void* context = nullptr;
    JAXMOE_CHECK(call<int (*)(void**, int)>("cuDevicePrimaryCtxRetain")(&context, 0) == 0);
    JAXMOE_CHECK(call<int (*)(void*)>("cuCtxPushCurrent_v2")(context) == 0);
    JAXMOE_CHECK(call<int (*)(void**, size_t)>("cuMemAlloc_v2")(&address_, bytes) == 0);
    JAXMOE_CHECK(call<int (*)(void**)>("cuCtxPopCurrent_v2")(&context) == 0);
  }
  char* address() const { return static_cast<char*>(address_); }

 private:
  template <typename Function>
  Function call(const char* symbol) const {
    return reinterpret_cast<Function>(dlsym(library_, symbol));
  }
  void* library_ = nullptr;
  void* address_ = nullptr;  // freed with the process
};

// What the stand-in is held to above, on the real thing, as far as a program can see it.
void check_cuda(DeviceDriver& driver) {
  constexpr size_t kBytes = size_t{64} << 20;
  const CudaMemory device(kBytes);
  std::vector<char> source(kBytes), back(kBytes);
  for (size_t i = 0; i < kBytes; ++i) source[i] = static_cast<char>(i * 7 + i / 1000);
  ok(driver.register_host(source.data(), kBytes, false));
  ok(driver.register_host(back.data(), kBytes, false));
  fails_with(driver.register_host(source.data(), kBytes, false), "cuMemHostRegister");
  int64_t free = 0, total = 0;
  ok(driver.memory_info(&free, &total));
  JAXMOE_CHECK(free > 0 && free <= total);

  DeviceStream first = new_stream(driver), second = new_stream(driver);
  DeviceEvent copied = new_event(driver), done = new_event(driver);
  bool is_done = false;
  ok(driver.event_query(done, &is_done));
  JAXMOE_CHECK(is_done, "an event that was never recorded is done");
  Gate gate;
  ok(driver.launch_host_func(first, Gate::pass, &gate));
  ok(driver.copy_to_device_async(device.address(), source.data(), kBytes, first));
  ok(driver.event_record(copied, first));
  ok(driver.stream_wait_event(second, copied));
  ok(driver.copy_to_host_async(back.data(), device.address(), kBytes, second));
  ok(driver.event_record(done, second));
  ok(driver.event_query(done, &is_done));
  JAXMOE_CHECK(!is_done);
  gate.open = true;
  ok(driver.event_synchronize(done));
  JAXMOE_CHECK(back == source);
  double seconds = 0;
  ok(driver.event_elapsed(copied, done, &seconds));
  JAXMOE_CHECK(seconds > 0);

  // Rows of 3000 from pitch 5000 to pitch 4000.
  constexpr size_t kRows = 1000;
  ok(driver.copy_to_device_2d_async({device.address(), 4000, source.data(), 5000, 3000, kRows},
                                    first));
  ok(driver.copy_to_host_async(back.data(), device.address(), kBytes, first));
  ok(driver.stream_synchronize(first));
  size_t wrong = 0;
  for (size_t i = 0; i < 4000 * kRows; ++i) {
    const size_t row = i / 4000, column = i % 4000;
    wrong += back[i] != (column < 3000 ? source[row * 5000 + column] : source[i]);
  }
  JAXMOE_CHECK(wrong == 0, "%zu", wrong);

  std::printf("     (stream memory operations: %s)\n", driver.supports_values() ? "yes" : "no");
  if (driver.supports_values()) {
    auto* words = reinterpret_cast<uint32_t*>(source.data());
    words[0] = 0xfffffffe;
    words[16] = 0;
    Gate passed;
    passed.open = true;
    ok(driver.wait_value32(first, &words[0], 1));  // across the wrap
    ok(driver.launch_host_func(first, Gate::pass, &passed));
    ok(driver.write_value32(first, &words[16], 7));
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    JAXMOE_CHECK(!passed.entered && std::atomic_ref<uint32_t>(words[16]).load() == 0);
    std::atomic_ref<uint32_t>(words[0]).store(1);
    ok(driver.stream_synchronize(first));
    JAXMOE_CHECK(passed.entered && std::atomic_ref<uint32_t>(words[16]).load() == 7);
  }
  fails_with(driver.copy_to_device_async(nullptr, source.data(), 16, first), "cuMemcpyHtoDAsync");
  ok(driver.stream_synchronize(first));  // that was refused, not enqueued
  ok(driver.unregister_host(source.data(), kBytes));
  ok(driver.unregister_host(back.data(), kBytes));
  for (DeviceEvent event : {copied, done}) ok(driver.event_destroy(event));
  for (DeviceStream stream : {first, second}) ok(driver.stream_destroy(stream));
}

void append_one(void* list) { static_cast<std::vector<int>*>(list)->push_back(1); }
void append_two(void* list) { static_cast<std::vector<int>*>(list)->push_back(2); }

}  // namespace

JAXMOE_TEST(copies_run_in_order_and_return_at_once) {
  HostDriver driver;
  DeviceStream stream = new_stream(driver);
  std::vector<int> source(1000), device(1000, -1), back(1000, -1);
  std::iota(source.begin(), source.end(), 0);
  const size_t bytes = source.size() * sizeof(int);
  Gate gate;
  ok(driver.launch_host_func(stream, Gate::pass, &gate));
  ok(driver.copy_to_device_async(device.data(), source.data(), bytes, stream));
  ok(driver.copy_to_host_async(back.data(), device.data(), bytes, stream));
  DeviceEvent event = new_event(driver);
  bool done = false;
  ok(driver.event_query(event, &done));
  JAXMOE_CHECK(done, "an event that was never recorded is done");
  ok(driver.event_record(event, stream));
  ok(driver.event_query(event, &done));
  JAXMOE_CHECK(!done);
  gate.open = true;
  ok(driver.event_synchronize(event));
  ok(driver.event_query(event, &done));
  JAXMOE_CHECK(done && back == source);
  ok(driver.event_destroy(event));
  ok(driver.stream_destroy(stream));
  fails_with(driver.stream_synchronize(stream), "no such stream");
  fails_with(driver.event_synchronize(event), "no such event");
}

JAXMOE_TEST(streams_are_independent_and_events_order_them) {
  HostDriver driver;
  DeviceStream first = new_stream(driver), second = new_stream(driver);
  DeviceEvent event = new_event(driver);
  Gate gate;
  std::vector<int> order;
  ok(driver.launch_host_func(first, Gate::pass, &gate));
  ok(driver.launch_host_func(first, append_one, &order));
  ok(driver.stream_wait_event(second, event));  // not recorded yet: nothing to wait for
  ok(driver.stream_synchronize(second));
  ok(driver.event_record(event, first));
  ok(driver.stream_wait_event(second, event));
  ok(driver.launch_host_func(second, append_two, &order));
  // A later record does not move what was waited for.
  Gate later;
  ok(driver.launch_host_func(first, Gate::pass, &later));
  ok(driver.event_record(event, first));
  gate.open = true;
  ok(driver.stream_synchronize(second));
  JAXMOE_CHECK((order == std::vector<int>{1, 2}));
  bool done = true;
  ok(driver.event_query(event, &done));
  JAXMOE_CHECK(!done);
  later.open = true;
  ok(driver.stream_synchronize(first));
}

JAXMOE_TEST(rows_are_copied_to_their_pitch) {
  HostDriver driver;
  DeviceStream stream = new_stream(driver);
  std::string source = "abcdefghijkl", device(12, '.');
  ok(driver.copy_to_device_2d_async({device.data(), 5, source.data() + 1, 4, 2, 3}, stream));
  ok(driver.stream_synchronize(stream));
  JAXMOE_CHECK(device == "bc...fg...jk", "%s", device.c_str());
  fails_with(driver.copy_to_device_2d_async({device.data(), 1, source.data(), 4, 2, 3}, stream),
             "pitch");
}

JAXMOE_TEST(a_failed_copy_fails_what_follows_until_it_is_synchronized) {
  HostDriver driver;
  DeviceStream stream = new_stream(driver), other = new_stream(driver);
  DeviceEvent event = new_event(driver);
  std::string source = "new", device = "old";
  driver.fail_copy(2, false, "the bus caught fire");
  ok(driver.copy_to_device_async(device.data(), source.data(), 1, stream));
  ok(driver.copy_to_device_async(device.data() + 1, source.data() + 1, 1, stream));
  ok(driver.copy_to_device_async(device.data() + 2, source.data() + 2, 1, stream));
  std::vector<int> called;
  ok(driver.launch_host_func(stream, append_one, &called));
  ok(driver.event_record(event, stream));
  ok(driver.stream_wait_event(other, event));
  fails_with(driver.event_synchronize(event), "caught fire");
  fails_with(driver.stream_synchronize(other), "caught fire");
  fails_with(driver.stream_synchronize(stream), "caught fire");
  JAXMOE_CHECK(device == "nld" && called.empty(), "%s", device.c_str());
  ok(driver.copy_to_device_async(device.data(), source.data(), 3, stream));
  ok(driver.stream_synchronize(stream));
  JAXMOE_CHECK(device == "new");
  driver.fail_copy(1, true, "refused");
  fails_with(driver.copy_to_device_async(device.data(), source.data(), 3, stream), "refused");
  ok(driver.stream_synchronize(stream));
}

JAXMOE_TEST(copies_are_checked) {
  HostDriverOptions options;
  options.copies_need_registered = true;
  options.max_registered_bytes = 100;
  HostDriver driver(options);
  DeviceStream stream = new_stream(driver);
  std::string source(200, 's'), device(50, 'd');
  char* from = source.data();
  fails_with(driver.copy_to_device_async(device.data(), from, 8, stream), "page-locked");
  ok(driver.register_host(from, 40, false));
  ok(driver.register_host(from + 40, 40, true));
  fails_with(driver.register_host(from + 79, 8, false), "already");
  fails_with(driver.register_host(from + 80, 21, false), "may be");
  JAXMOE_CHECK(driver.registered_bytes() == 80);
  ok(driver.copy_to_device_async(device.data(), from + 32, 8, stream));
  fails_with(driver.copy_to_device_async(device.data(), from + 33, 8, stream),
             "not within one page-locked range");
  driver.allow_destination(device.data(), 50);
  ok(driver.copy_to_device_async(device.data() + 42, from, 8, stream));
  fails_with(driver.copy_to_device_async(device.data() + 43, from, 8, stream), "may write");
  ok(driver.unregister_host(from, 40));
  fails_with(driver.unregister_host(from, 40), "not page-locked");
  fails_with(driver.copy_to_device_async(device.data(), from, 8, stream), "page-locked");
  ok(driver.stream_synchronize(stream));
}

JAXMOE_TEST(a_copy_that_meets_a_reader_is_noticed) {
  HostDriver driver;
  DeviceStream stream = new_stream(driver);
  std::string source(10, 's'), device(20, 'd');
  driver.begin_read(device.data() + 10, 10);
  ok(driver.copy_to_device_async(device.data(), source.data(), 10, stream));
  ok(driver.stream_synchronize(stream));
  JAXMOE_CHECK(driver.violations().empty());
  ok(driver.copy_to_device_async(device.data() + 1, source.data(), 10, stream));
  ok(driver.stream_synchronize(stream));
  JAXMOE_CHECK(driver.violations().size() == 1);
  driver.end_read(device.data() + 10, 10);
  ok(driver.copy_to_device_async(device.data() + 1, source.data(), 10, stream));
  ok(driver.stream_synchronize(stream));
  JAXMOE_CHECK(driver.violations().size() == 1);
}

JAXMOE_TEST(the_rate_is_that_of_all_streams_together) {
  HostDriverOptions options;
  options.bytes_per_s = 10e6;
  HostDriver driver(options);
  DeviceStream streams[] = {new_stream(driver), new_stream(driver)};
  DeviceEvent start = new_event(driver), end[] = {new_event(driver), new_event(driver)};
  std::vector<char> source(10000), device(20000);
  ok(driver.event_record(start, streams[0]));
  for (int i = 0; i < 20; ++i) {
    ok(driver.copy_to_device_async(device.data() + i % 2 * 10000, source.data(), 10000,
                                   streams[i % 2]));
  }
  double longest = 0;
  for (int i = 0; i < 2; ++i) {
    ok(driver.event_record(end[i], streams[i]));
    ok(driver.event_synchronize(end[i]));
    double seconds = 0;
    ok(driver.event_elapsed(start, end[i], &seconds));
    longest = std::max(longest, seconds);
  }
  // 200 kB at 10 MB/s; never faster, however the threads are scheduled.
  JAXMOE_CHECK(longest >= 0.0199, "%g s", longest);
}

JAXMOE_TEST(values_are_written_and_waited_for) {
  HostDriver driver;
  DeviceStream stream = new_stream(driver), other = new_stream(driver);
  uint32_t request = 0xfffffffe, answer = 0;
  std::vector<int> order;
  ok(driver.wait_value32(stream, &request, 1));  // three steps away, across the wrap
  ok(driver.launch_host_func(stream, append_two, &order));
  ok(driver.write_value32(stream, &answer, 7));
  ok(driver.launch_host_func(other, append_one, &order));
  ok(driver.stream_synchronize(other));
  for (int i = 0; i < 3; ++i) {
    JAXMOE_CHECK(std::atomic_ref<uint32_t>(answer).load() == 0);
    std::atomic_ref<uint32_t>(request).fetch_add(1);
  }
  ok(driver.stream_synchronize(stream));
  JAXMOE_CHECK((order == std::vector<int>{1, 2}) && answer == 7);
  // Destroying a stream that waits for ever ends it.
  ok(driver.wait_value32(stream, &request, 100));
  ok(driver.stream_destroy(stream));
}

JAXMOE_TEST(delays_change_nothing) {
  HostDriverOptions options;
  options.max_delay_s = 3e-4;
  HostDriver driver(options);
  DeviceStream streams[] = {new_stream(driver), new_stream(driver)};
  DeviceEvent event = new_event(driver);
  int value = 0, seen = 0;
  // A ping-pong: each turn reads what the other stream's last turn wrote.
  for (int turn = 1; turn <= 100; ++turn) {
    DeviceStream stream = streams[turn % 2];
    ok(driver.stream_wait_event(stream, event));
    ok(driver.launch_host_func(stream, [](void* p) { ++*static_cast<int*>(p); }, &value));
    ok(driver.copy_to_device_async(&seen, &value, sizeof(int), stream));
    ok(driver.event_record(event, stream));
  }
  ok(driver.event_synchronize(event));
  JAXMOE_CHECK(value == 100 && seen == 100, "%d %d", value, seen);
}

JAXMOE_TEST(a_cuda_driver_works_or_says_why_not) {
  std::shared_ptr<DeviceDriver> driver;
  Status status = create_cuda_driver(0, &driver);
  if (!status.ok()) {
    JAXMOE_CHECK(driver == nullptr);
    JAXMOE_CHECK(contains(status.message(), "libcuda.so.1") ||
                     contains(status.message(), "cuInit") ||
                     contains(status.message(), "no CUDA device"),
                 "%s", status.message().c_str());
    std::printf("     (not here: %s)\n", status.message().c_str());
    return;
  }
  std::printf("     (%s)\n", driver->describe().c_str());
  check_cuda(*driver);
  fails_with(create_cuda_driver(4096, &driver), "no CUDA device 4096");
}

JAXMOE_TEST_MAIN

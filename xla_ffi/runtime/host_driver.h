// DeviceDriver of the CPU platform: a stream is a thread that works its operations off in order, a
// copy is a memcpy, an event is a host event.
//
// It stands in for a GPU's copy engine: rate-limited if asked, so that the ratio of copying to
// computing can be set; and for tests it delays operations at random, fails copies on demand, and
// checks that copies stay within what they were allowed and never meet a reader.
#ifndef JAXMOE_RUNTIME_HOST_DRIVER_H_
#define JAXMOE_RUNTIME_HOST_DRIVER_H_

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime/device_driver.h"

namespace jaxmoe {

struct HostDriverOptions {
  double bytes_per_s = 0;  // of all streams together, each direction for itself; 0: no limit
  double max_delay_s = 0;  // before each operation, a random part of this
  uint64_t seed = 1;
  int64_t max_registered_bytes = -1;    // registering more fails; -1: no limit
  bool copies_need_registered = false;  // host memory that was not registered is refused
};

class HostDriver final : public DeviceDriver {
 public:
  using Clock = std::chrono::steady_clock;

  explicit HostDriver(const HostDriverOptions& options = {});
  ~HostDriver() override;

  std::string describe() const override;
  bool is_host() const override { return true; }
  Status memory_info(int64_t* free_bytes, int64_t* total_bytes) override;

  Status stream_create(DeviceStream* stream) override;
  Status stream_destroy(DeviceStream stream) override;
  // The error of the first operation that failed since the last call; the stream works again then.
  Status stream_synchronize(DeviceStream stream) override;
  Status stream_wait_event(DeviceStream stream, DeviceEvent event) override;
  Status event_create(DeviceEvent* event) override;
  Status event_destroy(DeviceEvent event) override;
  Status event_record(DeviceEvent event, DeviceStream stream) override;
  Status event_synchronize(DeviceEvent event) override;
  Status event_query(DeviceEvent event, bool* done) override;
  Status event_elapsed(DeviceEvent start, DeviceEvent end, double* seconds) override;
  Status copy_to_device_async(void* dst, const void* src, size_t bytes,
                              DeviceStream stream) override;
  Status copy_to_device_2d_async(const Copy2d& copy, DeviceStream stream) override;
  Status copy_to_host_async(void* dst, const void* src, size_t bytes, DeviceStream stream) override;
  Status register_host(void* address, size_t bytes, bool read_only) override;
  Status unregister_host(void* address, size_t bytes) override;
  Status launch_host_func(DeviceStream stream, HostFunction function, void* argument) override;
  bool supports_values() const override { return true; }
  Status write_value32(DeviceStream stream, uint32_t* address, uint32_t value) override;
  Status wait_value32(DeviceStream stream, uint32_t* address, uint32_t value) override;

  // Of all streams together from now on, each direction for itself; 0: no limit.
  void limit_rate(double bytes_per_s) { bytes_per_s_.store(bytes_per_s); }
  // The nth copy to the device from now on (1: the next) fails: when it is enqueued, or when its
  // turn comes, and then with it everything later on its stream.
  void fail_copy(int64_t nth, bool at_submission, std::string cause);
  // From the first call on, a copy to the device that leaves the allowed ranges fails.
  void allow_destination(const void* start, size_t bytes);
  // Reads of device memory by who stands for the device; between the two no copy may write there.
  void begin_read(const void* start, size_t bytes);
  void end_read(const void* start, size_t bytes);
  // What went against that: "a copy wrote ... while it was read".
  std::vector<std::string> violations() const;
  int64_t registered_bytes() const;

 private:
  class Stream;
  struct Completion;
  struct Event;
  struct Link {  // one direction of the bus
    std::mutex mutex;
    Clock::time_point free_at = {};
  };
  struct Range {
    uintptr_t begin, end;
    bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
    bool covers(const Range& other) const { return begin <= other.begin && other.end <= end; }
    bool operator==(const Range&) const = default;
  };

  std::shared_ptr<Stream> find_stream(DeviceStream stream) const;
  Status find_event(DeviceEvent event, std::shared_ptr<Event>* found) const;
  Status enqueue_copy(const Copy2d& copy, bool to_device, DeviceStream stream);
  Status check_registered(const Range& range) const;
  void begin_write(const Range& range);
  void end_write(const Range& range);

  const HostDriverOptions options_;
  std::atomic<double> bytes_per_s_;
  Link to_device_, to_host_;
  mutable std::mutex mutex_;  // guards everything below
  std::unordered_map<DeviceStream, std::shared_ptr<Stream>> streams_;
  std::unordered_map<DeviceEvent, std::shared_ptr<Event>> events_;
  uint64_t streams_made_ = 0;
  std::map<uintptr_t, uintptr_t> registered_;  // begin, end
  int64_t registered_bytes_ = 0;
  int64_t fail_in_ = 0;  // copies until the one that fails; 0: none will
  bool fail_at_submission_ = false;
  std::string fail_cause_;
  std::vector<Range> allowed_, reads_, writes_;
  std::vector<std::string> violations_;
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_HOST_DRIVER_H_

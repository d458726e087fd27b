// Page-locked memory: what a device copies from at full speed, and without its caller waiting.
#ifndef JAXMOE_RUNTIME_PAGE_LOCK_H_
#define JAXMOE_RUNTIME_PAGE_LOCK_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime/device_driver.h"
#include "runtime/status.h"

namespace jaxmoe {

struct MemoryRange {
  std::string name;  // for errors: "experts of NUMA node 0"
  uint8_t* data = nullptr;
  size_t bytes = 0;
  bool read_only = false;  // mapped so
};

// Holds ranges page-locked from creation to destruction; their memory must outlive it.
class PageLock {
 public:
  // Locking takes a while (seconds per 10 GB where nothing is huge pages), so it is done in parts
  // of this size, with a report after each. A copy may not reach from one part into the next:
  // run_length() says where to cut.
  static constexpr size_t kPartBytes = size_t{1} << 30;
  // (bytes locked, bytes in all); false ends it, as an error.
  using Progress = std::function<bool(int64_t, int64_t)>;

  // All or nothing; the error names the range.
  static Status create(std::shared_ptr<DeviceDriver> driver, const std::vector<MemoryRange>& ranges,
                       const Progress& progress, std::unique_ptr<PageLock>* lock,
                       size_t part_bytes = kPartBytes);
  ~PageLock();
  PageLock(const PageLock&) = delete;
  PageLock& operator=(const PageLock&) = delete;

  int64_t bytes() const { return bytes_; }
  // How many bytes from `start` on one copy may take; 0: that memory is not locked.
  size_t run_length(const uint8_t* start) const;

 private:
  explicit PageLock(std::shared_ptr<DeviceDriver> driver) : driver_(std::move(driver)) {}

  const std::shared_ptr<DeviceDriver> driver_;
  std::vector<std::pair<uint8_t*, size_t>> parts_;  // sorted once complete
  int64_t bytes_ = 0;
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_PAGE_LOCK_H_

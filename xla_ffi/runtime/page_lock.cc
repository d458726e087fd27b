#include "runtime/page_lock.h"

#include <algorithm>

namespace jaxmoe {

Status PageLock::create(std::shared_ptr<DeviceDriver> driver,
                        const std::vector<MemoryRange>& ranges, const Progress& progress,
                        std::unique_ptr<PageLock>* lock, size_t part_bytes) {
  std::unique_ptr<PageLock> result(new PageLock(std::move(driver)));
  int64_t total = 0;
  for (const MemoryRange& range : ranges) total += static_cast<int64_t>(range.bytes);
  for (const MemoryRange& range : ranges) {
    for (size_t done = 0; done < range.bytes;) {
      const size_t bytes = std::min(part_bytes, range.bytes - done);
      uint8_t* start = range.data + done;
      Status status = result->driver_->register_host(start, bytes, range.read_only);
      if (!status.ok()) {
        return Status::error("cannot page-lock " + range.name + " (bytes " + std::to_string(done) +
                             " to " + std::to_string(done + bytes) + " of " +
                             std::to_string(range.bytes) + "): " + status.message());
      }
      result->parts_.push_back({start, bytes});
      result->bytes_ += static_cast<int64_t>(bytes);
      done += bytes;
      if (progress && !progress(result->bytes_, total)) {
        return Status::error("page-locking was stopped at " + std::to_string(result->bytes_) +
                             " of " + std::to_string(total) + " bytes");
      }
    }
  }
  std::sort(result->parts_.begin(), result->parts_.end());
  *lock = std::move(result);
  return {};
}

PageLock::~PageLock() {
  // A driver that cannot undo it is going down with the process.
  for (auto [start, bytes] : parts_) (void)driver_->unregister_host(start, bytes);
}

size_t PageLock::run_length(const uint8_t* start) const {
  auto next = std::upper_bound(parts_.begin(), parts_.end(), start,
                               [](const uint8_t* at, const auto& part) { return at < part.first; });
  if (next == parts_.begin()) return 0;
  auto [first, bytes] = *std::prev(next);
  const size_t offset = static_cast<size_t>(start - first);
  return offset < bytes ? bytes - offset : 0;
}

}  // namespace jaxmoe

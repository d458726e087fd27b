// A named POSIX shared-memory segment that outlives the process that filled it.
//
// Two locks, both of which the kernel drops when a process ends, however it ends:
//   flock, shared:    held by everybody who uses the segment. Nobody holding it: the segment is
//                     stale and may be removed (jaxmoe/weights/shared_store.py does).
//   record lock (OFD): held while the segment is being filled, by one process at a time.
#ifndef JAXMOE_RUNTIME_SHARED_SEGMENT_H_
#define JAXMOE_RUNTIME_SHARED_SEGMENT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "runtime/status.h"

namespace jaxmoe {

class SharedSegment {
 public:
  // Opens or creates /dev/shm/NAME, readable by its owner alone, and takes both locks. A segment of
  // another size or another owner, or one that somebody else is filling, is an error. The mapping
  // starts at a huge-page boundary.
  static Status open(const std::string& name, size_t bytes,
                     std::unique_ptr<SharedSegment>* segment);
  // Without an error where there is none.
  static Status remove(const std::string& name);
  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  const std::string& name() const { return name_; }
  // Takes memory for the range now. Without it the first write to a full /dev/shm would end the
  // process with SIGBUS.
  Status reserve(size_t offset, size_t bytes) const;
  // Memory of the range that is not taken yet comes from this NUMA node.
  Status bind(size_t offset, size_t bytes, int node) const;
  // The filling is over: others may attach, and this process can no longer write, so that not even
  // a wild pointer can change a weight.
  Status seal();

 private:
  SharedSegment() = default;
  std::string name_;
  int fd_ = -1;
  void* mapping_ = nullptr;  // address space, one huge page more than `bytes_`
  size_t mapping_bytes_ = 0;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_SHARED_SEGMENT_H_

// Large memory with an owner: anonymous regions for weights, and read-only mappings of checkpoint
// files.
#ifndef JAXMOE_RUNTIME_MEMORY_H_
#define JAXMOE_RUNTIME_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "runtime/status.h"

namespace jaxmoe {

inline constexpr size_t kHugePageBytes = size_t{2} << 20;

// Memory of the range that is not taken yet comes from this NUMA node. Failures are reported, not
// ignored: half of a model on the wrong node would halve its speed unseen.
Status bind_to_node(void* address, size_t bytes, int node);

// Anonymous memory of one NUMA node: 2 MiB aligned, huge pages asked for, zero until written,
// resident only where touched.
class Arena {
 public:
  // bind_node < 0: not bound.
  static Status create(size_t bytes, int bind_node, std::unique_ptr<Arena>* arena);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  Arena() = default;
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// A whole file, mapped shared and read-only. Truncating the file while it is mapped kills the
// process at the next access (SIGBUS): the arena backing does not have this weakness.
class MappedFile {
 public:
  static Status open(const std::string& path, std::unique_ptr<MappedFile>* file);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }
  // Asks the kernel to begin reading the range into the page cache.
  void will_need(size_t offset, size_t bytes) const;

 private:
  MappedFile() = default;
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_MEMORY_H_

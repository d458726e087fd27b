// A growable block of scratch memory, 64-byte aligned, that keeps its largest size: after the first
// step of a shape nothing is allocated.
#ifndef JAXMOE_RUNTIME_SCRATCH_H_
#define JAXMOE_RUNTIME_SCRATCH_H_

#include <cstddef>
#include <cstdlib>

namespace jaxmoe {

inline constexpr size_t kCacheLine = 64;

inline constexpr size_t align_up(size_t value, size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Makes room for `bytes`; contents are lost. False when memory ran out.
  bool reserve(size_t bytes) {
    if (bytes <= capacity_) return true;
    std::free(data_);
    capacity_ = 0;
    // Half as much again, so that a slowly growing prompt does not reallocate at every step.
    size_t wanted = align_up(bytes + bytes / 2, 4096);
    data_ = static_cast<char*>(std::aligned_alloc(kCacheLine, wanted));
    if (data_ == nullptr) return false;
    capacity_ = wanted;
    return true;
  }
  char* data() const { return data_; }
  size_t capacity() const { return capacity_; }

 private:
  char* data_ = nullptr;
  size_t capacity_ = 0;
};

// Lays out parts of one scratch block: first add() all parts, then reserve(total()) and use base +
// offset.
class Layout {
 public:
  size_t add(size_t bytes) {
    size_t offset = total_;
    total_ += align_up(bytes, kCacheLine);
    return offset;
  }
  size_t total() const { return total_; }

 private:
  size_t total_ = 0;
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_SCRATCH_H_

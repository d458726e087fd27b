// The bytes of a fuzzer as numbers; zeros once they are used up.
#ifndef JAXMOE_TESTS_FUZZ_INPUT_H_
#define JAXMOE_TESTS_FUZZ_INPUT_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace jaxmoe_fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool empty() const { return left_ == 0; }
  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  int32_t word() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) value = value << 8 | byte();
    return static_cast<int32_t>(value);
  }
  // From low to high, both included.
  int64_t between(int64_t low, int64_t high) { return low + byte() % (high - low + 1); }
  // Mostly a small number about a valid range, now and then any.
  int32_t index(int64_t end) {
    uint8_t how = byte();
    if (how >= 250) return word();
    return static_cast<int32_t>(how % (end + 2)) - (how == 249 ? 2 : 0);
  }
  std::string rest() { return std::string(reinterpret_cast<const char*>(data_), left_); }

 private:
  const uint8_t* data_;
  size_t left_;
};

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::abort();
}

}  // namespace jaxmoe_fuzz

#endif  // JAXMOE_TESTS_FUZZ_INPUT_H_

// The floating-point mode every unit computes in: round to nearest, subnormals kept.
//
// A caller's thread may flush subnormals (XLA's threads do), a worker's does not; without this a
// result could depend on which thread computed it.
#ifndef JAXMOE_RUNTIME_FLOAT_MODE_H_
#define JAXMOE_RUNTIME_FLOAT_MODE_H_

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace jaxmoe {

class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatMode() { _mm_setcsr(saved_); }
#else
  FloatMode() {}
#endif
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

#if defined(__x86_64__)
 private:
  unsigned saved_;
#endif
};

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_FLOAT_MODE_H_

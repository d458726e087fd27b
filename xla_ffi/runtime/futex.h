// Waiting: a spin loop with bounded patience, then sleep in the kernel on a 32-bit word.
#ifndef JAXMOE_RUNTIME_FUTEX_H_
#define JAXMOE_RUNTIME_FUTEX_H_

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

namespace jaxmoe {

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleeps while *word == expected; may return early.
inline void futex_wait(std::atomic<uint32_t>* word, uint32_t expected) {
  static_assert(sizeof(*word) == sizeof(uint32_t));
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

inline void futex_wake(std::atomic<uint32_t>* word, int count = INT_MAX) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

// Spins until done() or the patience is over; true when done. The clock is read every 32 rounds
// only: a round is one pause, 40 to 140 cycles.
template <typename Done>
bool spin_until(Done done, std::chrono::nanoseconds patience) {
  if (done()) return true;
  auto end = std::chrono::steady_clock::now() + patience;
  do {
    for (int i = 0; i < 32; ++i) {
      cpu_pause();
      if (done()) return true;
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

// Waits for work that another running thread holds. It ends within the time of one unit unless that
// thread lost its CPU; then the CPU is offered to it.
template <typename Done>
void wait_for_peer(Done done) {
  // Several units' time: on a machine that is not overcommitted the first spin suffices.
  while (!spin_until(done, std::chrono::microseconds(50))) sched_yield();
}

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_FUTEX_H_

// Spreads copies over time so that together they take no more than a rate: what streaming leaves of
// the memory's bandwidth to those who decode meanwhile. Keeps no time itself, so that tests count
// instead of waiting.
#ifndef JAXMOE_PREFILL_PACER_H_
#define JAXMOE_PREFILL_PACER_H_

#include <algorithm>
#include <chrono>
#include <cstddef>

namespace jaxmoe {

class Pacer {
 public:
  using Time = std::chrono::steady_clock::time_point;
  using Duration = std::chrono::steady_clock::duration;

  // 0: no limit. What was booked before counts no more.
  void set_rate(double bytes_per_s) {
    rate_ = bytes_per_s;
    free_at_ = {};
  }
  bool limits() const { return rate_ > 0; }
  // How long so many bytes take at the rate.
  Duration span(size_t bytes) const {
    if (!limits()) return {};
    return std::chrono::round<Duration>(
        std::chrono::duration<double>(static_cast<double>(bytes) / rate_));
  }
  // Books a copy: when it may begin. The next one may begin when this one would be done at the
  // rate. Time in which nothing was copied is not made up for: a burst would be what hurts.
  Time book(size_t bytes, Time now) {
    if (!limits()) return now;
    const Time begin = std::max(free_at_, now);
    free_at_ = begin + span(bytes);
    return begin;
  }

 private:
  double rate_ = 0;
  Time free_at_ = {};
};

}  // namespace jaxmoe

#endif  // JAXMOE_PREFILL_PACER_H_

#include "runtime/host_driver.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <sstream>
#include <thread>

namespace jaxmoe {
namespace {

// How often a stream looks at a word that another thread will write.
constexpr auto kPollEvery = std::chrono::microseconds(20);

Status unknown(const char* what) {
  return Status::error(std::string("no such ") + what + ": it was never created, or destroyed");
}

std::string describe_range(const char* what, uintptr_t begin, uintptr_t end) {
  std::ostringstream text;
  text << what << " [0x" << std::hex << begin << ", 0x" << end << ")";
  return text.str();
}

template <typename T>
void remove_one(std::vector<T>* values, const T& value) {
  auto found = std::find(values->begin(), values->end(), value);
  if (found != values->end()) values->erase(found);
}

}  // namespace

// One record of an event: done once the stream has come to it.
struct HostDriver::Completion {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  Status status;
  Clock::time_point at = {};

  void complete(const Status& result, Clock::time_point time) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      done = true;
      status = result;
      at = time;
    }
    changed.notify_all();
  }
  Status wait(Clock::time_point* time = nullptr) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return done; });
    if (time != nullptr) *time = at;
    return status;
  }
};

struct HostDriver::Event {
  std::shared_ptr<Completion> last;  // guarded by the driver's mutex
};

// Its clock: `now` is when the stream would have come to this point if its thread were always
// scheduled at once, so that a limited rate is kept exactly although sleeping is not exact.
class HostDriver::Stream {
 public:
  struct Turn {
    Clock::time_point now;
    Status status;  // an error ends the stream's work until it is synchronized
    const Stream& stream;
  };
  using Operation = std::function<void(Turn*)>;

  Stream(double max_delay_s, uint64_t seed)
      : max_delay_s_(max_delay_s), random_(seed), thread_([this] { main(); }) {}
  ~Stream() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  // even_after_error: what others wait for.
  void enqueue(Operation operation, bool even_after_error = false) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back({std::move(operation), Clock::now(), even_after_error});
    }
    changed_.notify_all();
  }
  Status synchronize() {
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [&] { return queue_.empty() && !busy_; });
    return std::exchange(status_, Status());
  }
  bool stopping() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return stop_;
  }

 private:
  struct Entry {
    Operation operation;
    Clock::time_point enqueued;
    bool even_after_error;
  };

  void main() {
    Clock::time_point now = {};
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      Entry entry = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      Turn turn{std::max(now, entry.enqueued), status_, *this};
      lock.unlock();
      if (max_delay_s_ > 0) {
        std::uniform_real_distribution<double> delay(0, max_delay_s_);
        std::this_thread::sleep_for(std::chrono::duration<double>(delay(random_)));
        turn.now = Clock::now();
      }
      if (turn.status.ok() || entry.even_after_error) entry.operation(&turn);
      entry.operation = nullptr;
      now = turn.now;
      lock.lock();
      if (status_.ok()) status_ = turn.status;
      busy_ = false;
      if (queue_.empty()) idle_.notify_all();
    }
  }

  const double max_delay_s_;
  std::mt19937_64 random_;
  mutable std::mutex mutex_;
  std::condition_variable changed_, idle_;
  std::deque<Entry> queue_;
  Status status_;
  bool busy_ = false, stop_ = false;
  std::thread thread_;  // last: it uses the rest
};

HostDriver::HostDriver(const HostDriverOptions& options)
    : options_(options), bytes_per_s_(options.bytes_per_s) {}
HostDriver::~HostDriver() { streams_.clear(); }

std::string HostDriver::describe() const {
  const double rate = bytes_per_s_.load();
  if (rate <= 0) return "host memory in place of a device";
  std::ostringstream text;
  text << "host memory in place of a device, copies limited to " << rate / 1e9 << " GB/s";
  return text.str();
}

Status HostDriver::memory_info(int64_t*, int64_t*) {
  return Status::error("host memory in place of a device has no size of its own");
}

std::shared_ptr<HostDriver::Stream> HostDriver::find_stream(DeviceStream stream) const {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = streams_.find(stream);
  return found == streams_.end() ? nullptr : found->second;
}

Status HostDriver::find_event(DeviceEvent event, std::shared_ptr<Event>* found) const {
  std::lock_guard<std::mutex> lock(mutex_);
  auto place = events_.find(event);
  if (place == events_.end()) return unknown("event");
  *found = place->second;
  return {};
}

Status HostDriver::stream_create(DeviceStream* stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto made = std::make_shared<Stream>(options_.max_delay_s, options_.seed + streams_made_++);
  *stream = made.get();
  streams_[*stream] = std::move(made);
  return {};
}

Status HostDriver::stream_destroy(DeviceStream stream) {
  std::shared_ptr<Stream> last;  // ends outside the lock
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = streams_.find(stream);
  if (found == streams_.end()) return unknown("stream");
  last = std::move(found->second);
  streams_.erase(found);
  return {};
}

Status HostDriver::stream_synchronize(DeviceStream stream) {
  std::shared_ptr<Stream> on = find_stream(stream);
  return on == nullptr ? unknown("stream") : on->synchronize();
}

Status HostDriver::stream_wait_event(DeviceStream stream, DeviceEvent event) {
  std::shared_ptr<Stream> on = find_stream(stream);
  if (on == nullptr) return unknown("stream");
  std::shared_ptr<Event> found;
  Status status = find_event(event, &found);
  if (!status.ok()) return status;
  std::shared_ptr<Completion> last;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    last = found->last;
  }
  if (last == nullptr) return {};
  on->enqueue([last](Stream::Turn* turn) {
    Clock::time_point at;
    turn->status = last->wait(&at);
    turn->now = std::max(turn->now, at);
  });
  return {};
}

Status HostDriver::event_create(DeviceEvent* event) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto made = std::make_shared<Event>();
  *event = made.get();
  events_[*event] = std::move(made);
  return {};
}

Status HostDriver::event_destroy(DeviceEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  return events_.erase(event) == 1 ? Status() : unknown("event");
}

Status HostDriver::event_record(DeviceEvent event, DeviceStream stream) {
  std::shared_ptr<Stream> on = find_stream(stream);
  if (on == nullptr) return unknown("stream");
  std::shared_ptr<Event> found;
  Status status = find_event(event, &found);
  if (!status.ok()) return status;
  auto completion = std::make_shared<Completion>();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    found->last = completion;
  }
  on->enqueue([completion](Stream::Turn* turn) { completion->complete(turn->status, turn->now); },
              true);
  return {};
}

Status HostDriver::event_synchronize(DeviceEvent event) {
  std::shared_ptr<Event> found;
  Status status = find_event(event, &found);
  if (!status.ok()) return status;
  std::shared_ptr<Completion> last;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    last = found->last;
  }
  return last == nullptr ? Status() : last->wait();
}

Status HostDriver::event_query(DeviceEvent event, bool* done) {
  std::shared_ptr<Event> found;
  Status status = find_event(event, &found);
  if (!status.ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  *done = true;
  if (found->last == nullptr) return {};
  std::lock_guard<std::mutex> inner(found->last->mutex);
  *done = found->last->done;
  return found->last->status;
}

Status HostDriver::event_elapsed(DeviceEvent start, DeviceEvent end, double* seconds) {
  Clock::time_point at[2];
  DeviceEvent events[] = {start, end};
  for (int i = 0; i < 2; ++i) {
    bool done = false;
    Status status = event_query(events[i], &done);
    if (!status.ok()) return status;
    std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<Completion> last = events_[events[i]]->last;
    if (!done || last == nullptr) {
      return Status::error("the time between events that are not done yet");
    }
    (void)last->wait(&at[i]);
  }
  *seconds = std::chrono::duration<double>(at[1] - at[0]).count();
  return {};
}

Status HostDriver::copy_to_device_async(void* dst, const void* src, size_t bytes,
                                        DeviceStream stream) {
  return enqueue_copy({dst, bytes, src, bytes, bytes, 1}, true, stream);
}

Status HostDriver::copy_to_device_2d_async(const Copy2d& copy, DeviceStream stream) {
  return enqueue_copy(copy, true, stream);
}

Status HostDriver::copy_to_host_async(void* dst, const void* src, size_t bytes,
                                      DeviceStream stream) {
  return enqueue_copy({dst, bytes, src, bytes, bytes, 1}, false, stream);
}

Status HostDriver::enqueue_copy(const Copy2d& copy, bool to_device, DeviceStream stream) {
  std::shared_ptr<Stream> on = find_stream(stream);
  if (on == nullptr) return unknown("stream");
  if (copy.rows == 0 || copy.width == 0) return {};
  if (copy.rows > 1 && (copy.dst_pitch < copy.width || copy.src_pitch < copy.width)) {
    return Status::error("a copy of rows of " + std::to_string(copy.width) +
                         " bytes has a pitch less than that");
  }
  auto range = [&](const void* start, size_t pitch) {
    const auto begin = reinterpret_cast<uintptr_t>(start);
    return Range{begin, begin + pitch * (copy.rows - 1) + copy.width};
  };
  const Range dst = range(copy.dst, copy.dst_pitch), src = range(copy.src, copy.src_pitch);
  bool fails = false;
  std::string cause;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Status status = check_registered(to_device ? src : dst);
    if (!status.ok()) return status;
    if (to_device && fail_in_ > 0 && --fail_in_ == 0) {
      fails = true;
      cause = fail_cause_;
      if (fail_at_submission_) return Status::error(cause);
    }
    if (to_device && !allowed_.empty() &&
        std::none_of(allowed_.begin(), allowed_.end(),
                     [&](const Range& range) { return range.covers(dst); })) {
      return Status::error(
          describe_range("a copy leaves the memory it may write:", dst.begin, dst.end));
    }
  }
  Link* link = to_device ? &to_device_ : &to_host_;
  on->enqueue([this, copy, dst, link, to_device, fails, cause](Stream::Turn* turn) {
    if (fails) {
      turn->status = Status::error(cause);
      return;
    }
    Clock::time_point end = {};
    if (const double rate = bytes_per_s_.load(); rate > 0) {
      const std::chrono::duration<double> takes(static_cast<double>(copy.width * copy.rows) / rate);
      std::lock_guard<std::mutex> lock(link->mutex);
      end = std::max(turn->now, link->free_at) + std::chrono::duration_cast<Clock::duration>(takes);
      link->free_at = end;
    }
    if (to_device) begin_write(dst);
    for (size_t row = 0; row < copy.rows; ++row) {
      std::memcpy(static_cast<char*>(copy.dst) + row * copy.dst_pitch,
                  static_cast<const char*>(copy.src) + row * copy.src_pitch, copy.width);
    }
    const Clock::time_point copied = Clock::now();
    if (copied < end) std::this_thread::sleep_until(end);
    if (to_device) end_write(dst);
    turn->now = std::max(copied, end);
  });
  return {};
}

Status HostDriver::check_registered(const Range& range) const {
  if (!options_.copies_need_registered) return {};
  auto next = registered_.upper_bound(range.begin);
  if (next != registered_.begin()) {
    auto [begin, end] = *std::prev(next);
    if (Range{begin, end}.covers(range)) return {};
  }
  return Status::error(describe_range("not within one page-locked range:", range.begin, range.end));
}

Status HostDriver::register_host(void* address, size_t bytes, bool) {
  const Range range{reinterpret_cast<uintptr_t>(address),
                    reinterpret_cast<uintptr_t>(address) + bytes};
  std::lock_guard<std::mutex> lock(mutex_);
  if (address == nullptr || bytes == 0) return Status::error("no memory to page-lock was given");
  for (auto [begin, end] : registered_) {
    if (Range{begin, end}.overlaps(range)) {
      return Status::error(
          describe_range("memory is page-locked already:", range.begin, range.end));
    }
  }
  if (options_.max_registered_bytes >= 0 &&
      registered_bytes_ + static_cast<int64_t>(bytes) > options_.max_registered_bytes) {
    return Status::error("cannot page-lock " + std::to_string(bytes) +
                         " bytes more: " + std::to_string(registered_bytes_) + " are, and " +
                         std::to_string(options_.max_registered_bytes) + " may be");
  }
  registered_[range.begin] = range.end;
  registered_bytes_ += static_cast<int64_t>(bytes);
  return {};
}

Status HostDriver::unregister_host(void* address, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto begin = reinterpret_cast<uintptr_t>(address);
  auto found = registered_.find(begin);
  if (found == registered_.end() || found->second != begin + bytes) {
    return Status::error(describe_range("memory is not page-locked:", begin, begin + bytes));
  }
  registered_.erase(found);
  registered_bytes_ -= static_cast<int64_t>(bytes);
  return {};
}

Status HostDriver::launch_host_func(DeviceStream stream, HostFunction function, void* argument) {
  std::shared_ptr<Stream> on = find_stream(stream);
  if (on == nullptr) return unknown("stream");
  on->enqueue([function, argument](Stream::Turn* turn) {
    function(argument);
    turn->now = Clock::now();
  });
  return {};
}

Status HostDriver::write_value32(DeviceStream stream, uint32_t* address, uint32_t value) {
  std::shared_ptr<Stream> on = find_stream(stream);
  if (on == nullptr) return unknown("stream");
  on->enqueue([address, value](Stream::Turn*) {
    std::atomic_ref<uint32_t>(*address).store(value, std::memory_order_release);
  });
  return {};
}

Status HostDriver::wait_value32(DeviceStream stream, uint32_t* address, uint32_t value) {
  std::shared_ptr<Stream> on = find_stream(stream);
  if (on == nullptr) return unknown("stream");
  on->enqueue([address, value](Stream::Turn* turn) {
    std::atomic_ref<uint32_t> word(*address);
    while (static_cast<int32_t>(word.load(std::memory_order_acquire) - value) < 0) {
      if (turn->stream.stopping()) {
        turn->status = Status::error("the stream was destroyed while it waited for a value");
        return;
      }
      std::this_thread::sleep_for(kPollEvery);
    }
    turn->now = std::max(turn->now, Clock::now() - kPollEvery);
  });
  return {};
}

void HostDriver::fail_copy(int64_t nth, bool at_submission, std::string cause) {
  std::lock_guard<std::mutex> lock(mutex_);
  fail_in_ = nth;
  fail_at_submission_ = at_submission;
  fail_cause_ = std::move(cause);
}

void HostDriver::allow_destination(const void* start, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  allowed_.push_back(
      {reinterpret_cast<uintptr_t>(start), reinterpret_cast<uintptr_t>(start) + bytes});
}

void HostDriver::begin_read(const void* start, size_t bytes) {
  const Range range{reinterpret_cast<uintptr_t>(start), reinterpret_cast<uintptr_t>(start) + bytes};
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Range& write : writes_) {
    if (write.overlaps(range)) {
      violations_.push_back(describe_range("read while a copy wrote", write.begin, write.end));
    }
  }
  reads_.push_back(range);
}

void HostDriver::end_read(const void* start, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  remove_one(&reads_,
             {reinterpret_cast<uintptr_t>(start), reinterpret_cast<uintptr_t>(start) + bytes});
}

void HostDriver::begin_write(const Range& range) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Range& read : reads_) {
    if (read.overlaps(range)) {
      violations_.push_back(
          describe_range("a copy wrote while it was read:", read.begin, read.end));
    }
  }
  writes_.push_back(range);
}

void HostDriver::end_write(const Range& range) {
  std::lock_guard<std::mutex> lock(mutex_);
  remove_one(&writes_, range);
}

std::vector<std::string> HostDriver::violations() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return violations_;
}

int64_t HostDriver::registered_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return registered_bytes_;
}

}  // namespace jaxmoe

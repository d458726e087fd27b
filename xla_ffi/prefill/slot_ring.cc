#include "prefill/slot_ring.h"

#include <algorithm>

namespace jaxmoe {
namespace {

// Jobs whose copies are enqueued and not done: one that is copied, one behind it so that the copy
// engine never idles, and one for the time the loader needs to wake up. More would only lengthen an
// abort, which cannot take back what is enqueued.
constexpr size_t kJobsAhead = 3;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Status in_job(const SlotJob& job, const Status& status) {
  if (status.ok()) return status;
  return Status::error("loading " + job.name + " into slot " + std::to_string(job.slot) +
                       " failed: " + status.message());
}

}  // namespace

Status SlotRing::create(std::shared_ptr<DeviceDriver> driver,
                        std::vector<std::vector<SlotBuffer>> slots, std::shared_ptr<SlotRing>* ring,
                        std::chrono::nanoseconds stall) {
  if (slots.size() < 2) {
    return Status::error("a ring of " + std::to_string(slots.size()) +
                         " slots cannot be filled while it is read: wanted at least 2");
  }
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (size_t s = 0; s < slots.size(); ++s) {
    for (const SlotBuffer& buffer : slots[s]) {
      if (buffer.data == nullptr || buffer.bytes == 0) {
        return Status::error("slot " + std::to_string(s) + " has an empty buffer");
      }
      const auto begin = reinterpret_cast<uintptr_t>(buffer.data);
      ranges.push_back({begin, begin + buffer.bytes});
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) {
      return Status::error(
          "two buffers of the ring share memory: every one must be an array of "
          "its own");
    }
  }
  std::shared_ptr<SlotRing> result(new SlotRing(std::move(driver), stall));
  Status status = result->driver_->stream_create(&result->stream_);
  for (size_t s = 0; status.ok() && s < slots.size(); ++s) {
    Slot& slot = result->slots_.emplace_back();
    slot.buffers = std::move(slots[s]);
    for (DeviceEvent* event : {&slot.start, &slot.on, &slot.off}) {
      if (status.ok()) status = result->driver_->event_create(event);
    }
  }
  if (!status.ok()) return status;
  result->loader_ = std::thread([raw = result.get()] { raw->loader_main(); });
  *ring = std::move(result);
  return {};
}

SlotRing::~SlotRing() {
  abort("the ring was closed");
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (loader_.joinable()) loader_.join();
  // Nobody is left to tell of a failure here.
  for (Slot& slot : slots_) {
    for (DeviceEvent event : {slot.start, slot.on, slot.off}) {
      if (event != nullptr) (void)driver_->event_destroy(event);
    }
  }
  if (stream_ != nullptr) (void)driver_->stream_destroy(stream_);
}

Status SlotRing::check_job(const SlotJob& job, size_t index) const {
  const std::string who = "job " + std::to_string(index) + " (" + job.name + ")";
  if (job.slot < 0 || job.slot >= num_slots()) {
    return Status::error(who + " names slot " + std::to_string(job.slot) + " of a ring of " +
                         std::to_string(num_slots()));
  }
  const std::vector<SlotBuffer>& buffers = slots_[job.slot].buffers;
  for (const SlotCopy& copy : job.copies) {
    if (copy.buffer < 0 || copy.buffer >= static_cast<int>(buffers.size())) {
      return Status::error(who + " names buffer " + std::to_string(copy.buffer) +
                           " of a slot that has " + std::to_string(buffers.size()));
    }
    if (copy.src == nullptr || copy.width == 0 || copy.rows == 0 ||
        (copy.rows > 1 && (copy.dst_pitch < copy.width || copy.src_pitch < copy.width))) {
      return Status::error(who + " has a copy of nothing, or one whose rows overlap");
    }
    const size_t end = copy.dst_offset + (copy.rows - 1) * copy.dst_pitch + copy.width;
    if (end > buffers[copy.buffer].bytes) {
      return Status::error(who + " writes up to byte " + std::to_string(end) + " of buffer " +
                           std::to_string(copy.buffer) + " of slot " + std::to_string(job.slot) +
                           ", which has " + std::to_string(buffers[copy.buffer].bytes));
    }
  }
  return {};
}

Status SlotRing::check_slot(int slot) const {
  if (slot >= 0 && slot < num_slots()) return {};
  return Status::error("slot " + std::to_string(slot) + " of a ring of " +
                       std::to_string(num_slots()));
}

const SlotJob& SlotRing::job_of(int slot, int64_t generation) const {
  auto is_it = [&](const SlotJob& job) { return job.slot == slot && generation-- == 0; };
  return *std::find_if(run_->jobs.begin(), run_->jobs.end(), is_it);
}

Status SlotRing::start(std::shared_ptr<const SlotJobs> jobs, bool allow_unlocked) {
  if (jobs->unlocked_bytes > 0 && !allow_unlocked && !driver_->is_host()) {
    return Status::error(std::to_string(jobs->unlocked_bytes) +
                         " bytes of the run's sources are not page-locked: lock them before the "
                         "jobs are made, or allow such copies, which are several times slower");
  }
  for (size_t i = 0; i < jobs->jobs.size(); ++i) {
    Status status = check_job(jobs->jobs[i], i);
    if (!status.ok()) return status;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  if (has_run_) {
    return Status::error("the ring has a run under way: finish() or abort() it first");
  }
  has_run_ = true;  // of this call from here on
  changed_.wait(lock, [&] { return state_ == State::kIdle && calls_ == 0; });
  lock.unlock();
  wait_for_device();
  lock.lock();
  for (Slot& slot : slots_) {
    slot.jobs = slot.loaded = slot.acquired = slot.released = 0;
    slot.off_recorded = false;
    slot.user = nullptr;
  }
  for (const SlotJob& job : jobs->jobs) ++slots_[job.slot].jobs;
  failure_ = Status();
  stats_ = SlotRingStats();
  run_ = std::move(jobs);
  state_ = State::kRunning;
  lock.unlock();
  changed_.notify_all();
  return {};
}

// Until nothing that an earlier run enqueued reads a slot. Its errors were told when it ended.
void SlotRing::wait_for_device() {
  for (Slot& slot : slots_) {
    if (slot.released < slot.acquired && slot.user != nullptr) {
      (void)driver_->stream_synchronize(slot.user);
    } else if (slot.off_recorded) {
      (void)driver_->event_synchronize(slot.off);
    }
  }
}

Status SlotRing::acquire(int index, DeviceStream stream) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (Status status = check_slot(index); !status.ok()) return status;
  if (!failure_.ok()) return failure_;
  Slot& slot = slots_[index];
  if (!has_run_ || run_ == nullptr) {
    return Status::error("slot " + std::to_string(index) + " was acquired without a run");
  }
  if (slot.acquired != slot.released) {
    fail(Status::error("slot " + std::to_string(index) + " was acquired twice without a release"));
    return failure_;
  }
  if (slot.acquired == slot.jobs) {
    fail(Status::error("slot " + std::to_string(index) +
                       " was acquired more often than the run "
                       "fills it (" +
                       std::to_string(slot.jobs) + " times)"));
    return failure_;
  }
  ++calls_;
  const Clock::time_point began = Clock::now();
  const int64_t generation = slot.acquired++;
  slot.user = stream;
  wait_moving(lock, "acquire", [&] { return slot.loaded > generation; });
  Status status = failure_;
  lock.unlock();
  if (status.ok()) {
    status = stream != nullptr ? driver_->stream_wait_event(stream, slot.on)
                               : driver_->event_synchronize(slot.on);
  }
  lock.lock();
  stats_.acquire_wait_s += seconds_since(began);
  if (!status.ok() && failure_.ok()) fail(in_job(job_of(index, generation), status));
  if (!failure_.ok()) status = failure_;
  --calls_;
  moved();
  return status;
}

Status SlotRing::release(int index, DeviceStream stream) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (Status status = check_slot(index); !status.ok()) return status;
  Slot& slot = slots_[index];
  if (slot.released == slot.acquired) {
    if (failure_.ok()) {
      fail(Status::error("slot " + std::to_string(index) + " was released without an acquire"));
    }
    return failure_;
  }
  ++calls_;
  lock.unlock();
  // Also of a failed run: the next one waits for it.
  Status status = stream != nullptr ? driver_->event_record(slot.off, stream) : Status();
  lock.lock();
  if (!status.ok() && failure_.ok()) fail(status);
  if (stream != nullptr && status.ok()) slot.off_recorded = true;
  ++slot.released;
  --calls_;
  moved();
  return failure_;
}

Status SlotRing::finish() {
  std::shared_ptr<const SlotJobs> last;  // may own what wants other locks: goes after ours
  std::unique_lock<std::mutex> lock(mutex_);
  if (!has_run_) {
    // A failure that abort() or an earlier finish() ended is told again.
    return !failure_.ok() ? failure_ : Status::error("the ring has no run to finish");
  }
  wait_moving(lock, "finish", [&] { return state_ == State::kIdle && all_released(); });
  changed_.wait(lock, [&] { return state_ == State::kIdle; });
  has_run_ = false;
  last.swap(run_);
  return failure_;
}

void SlotRing::abort(const std::string& cause) {
  std::shared_ptr<const SlotJobs> last;
  std::unique_lock<std::mutex> lock(mutex_);
  if (!has_run_) return;
  if (failure_.ok()) fail(Status::error("the run was aborted: " + cause));
  changed_.wait(lock, [&] { return state_ == State::kIdle; });
  has_run_ = false;
  last.swap(run_);
}

SlotRingStats SlotRing::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

bool SlotRing::all_released() const {
  return std::all_of(slots_.begin(), slots_.end(),
                     [](const Slot& slot) { return slot.released == slot.jobs; });
}

void SlotRing::moved() {
  ++moves_;
  changed_.notify_all();
}

void SlotRing::fail(const Status& cause) {
  failure_ = cause;
  moved();
}

template <typename Done>
void SlotRing::wait_moving(std::unique_lock<std::mutex>& lock, const char* who, Done done) {
  auto over = [&] { return !failure_.ok() || done(); };
  while (!over()) {
    const uint64_t moves = moves_;
    const bool some = changed_.wait_for(lock, stall_, [&] { return over() || moves_ != moves; });
    if (!some) {
      fail(Status::error(std::string(who) + " waited while nothing moved in the ring for " +
                         std::to_string(std::chrono::duration<double>(stall_).count()) +
                         " s; slots (jobs, loaded, acquired, released): " + describe_slots()));
    }
  }
}

std::string SlotRing::describe_slots() const {
  std::string text;
  for (const Slot& slot : slots_) {
    text += (text.empty() ? "" : ", ") + std::to_string(slot.jobs) + " " +
            std::to_string(slot.loaded) + " " + std::to_string(slot.acquired) + " " +
            std::to_string(slot.released);
  }
  return text;
}

void SlotRing::loader_main() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || state_ == State::kRunning; });
    if (state_ != State::kRunning) return;
    std::shared_ptr<const SlotJobs> run = run_;
    lock.unlock();
    Status status;
    for (size_t i = 0; status.ok() && i < run->jobs.size(); ++i) status = load(run->jobs[i]);
    while (status.ok() && !in_flight_.empty()) status = retire_oldest();
    in_flight_.clear();
    // After a failure the copies behind it are still enqueued, and read the sources.
    if (!status.ok()) (void)driver_->stream_synchronize(stream_);
    run = nullptr;
    lock.lock();
    if (!status.ok() && failure_.ok()) failure_ = status;
    state_ = State::kIdle;
    moved();
  }
}

// Returns the run's failure where somebody else met it.
Status SlotRing::load(const SlotJob& job) {
  // The slot's events are about to be recorded anew.
  while (in_flight_.size() >= kJobsAhead ||
         std::any_of(in_flight_.begin(), in_flight_.end(),
                     [&](const SlotJob* other) { return other->slot == job.slot; })) {
    Status status = retire_oldest();
    if (!status.ok()) return status;
  }
  Slot& slot = slots_[job.slot];
  bool off_recorded = false;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    const Clock::time_point began = Clock::now();
    changed_.wait(lock, [&] { return !failure_.ok() || slot.released == slot.loaded; });
    stats_.loader_wait_s += seconds_since(began);
    if (!failure_.ok()) return failure_;
    off_recorded = slot.off_recorded;
  }
  Status status;
  if (off_recorded) status = driver_->stream_wait_event(stream_, slot.off);
  if (status.ok()) status = submit(job);
  if (!status.ok()) return status;
  in_flight_.push_back(&job);
  std::lock_guard<std::mutex> lock(mutex_);
  ++slot.loaded;
  moved();
  return {};
}

Status SlotRing::submit(const SlotJob& job) {
  Slot& slot = slots_[job.slot];
  Status status = driver_->event_record(slot.start, stream_);
  if (!status.ok()) return in_job(job, status);
  for (const SlotCopy& copy : job.copies) {
    if (Status turn = wait_for_turn(copy.bytes()); !turn.ok()) return turn;
    uint8_t* dst = slot.buffers[copy.buffer].data + copy.dst_offset;
    if (copy.rows == 1) {
      status = driver_->copy_to_device_async(dst, copy.src, copy.width, stream_);
    } else {
      status = driver_->copy_to_device_2d_async(
          {dst, copy.dst_pitch, copy.src, copy.src_pitch, copy.width, copy.rows}, stream_);
    }
    if (!status.ok()) return in_job(job, status);
  }
  return in_job(job, driver_->event_record(slot.on, stream_));
}

// The run's failure where there is one. On a device the copies are spaced where they are enqueued,
// one at a time, each at the bus's own speed.
Status SlotRing::wait_for_turn(size_t bytes) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (bool turn = false; !turn && failure_.ok();) {
    const uint64_t paces = paces_;
    const Pacer::Time begin = pacer_.book(bytes, Clock::now());
    const double takes = std::chrono::duration<double>(pacer_.span(bytes)).count();
    turn = !changed_.wait_until(lock, begin, [&] { return !failure_.ok() || paces_ != paces; });
    if (turn && takes > 0) {
      stats_.paced_bytes += static_cast<int64_t>(bytes);
      stats_.paced_s += takes;
    }
  }
  return failure_;
}

void SlotRing::set_pace(double bytes_per_s) {
  std::lock_guard<std::mutex> lock(mutex_);
  pacer_.set_rate(bytes_per_s);
  ++paces_;
  changed_.notify_all();
}

Status SlotRing::retire_oldest() {
  const SlotJob& job = *in_flight_.front();
  in_flight_.pop_front();
  const Slot& slot = slots_[job.slot];
  double seconds = 0;
  Status status = driver_->event_synchronize(slot.on);
  if (status.ok()) status = driver_->event_elapsed(slot.start, slot.on, &seconds);
  if (!status.ok()) return in_job(job, status);
  std::lock_guard<std::mutex> lock(mutex_);
  ++stats_.jobs;
  stats_.copies += static_cast<int64_t>(job.copies.size());
  for (const SlotCopy& copy : job.copies) stats_.bytes += static_cast<int64_t>(copy.bytes());
  stats_.copy_s += seconds;
  moved();
  return {};
}

}  // namespace jaxmoe

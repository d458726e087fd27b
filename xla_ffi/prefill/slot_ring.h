// The ring through which weights stream to a device (paper section 3.1; design: SLP ring).
//
// A slot is one or more long-lived buffers of the device. A run is an ordered list of jobs, each
// the copies that fill one slot; the loader, a thread, works them off on a stream of its own while
// the model computes. Every use of a slot has an ON and an OFF, each a pair of a device event and
// host state: the loader fills a slot again only after OFF of its last use, the model reads it only
// after ON. The host halves are waited for by threads, the device halves by streams, so on a GPU
// neither the loader nor the launching thread waits for the device's work:
//
//   loader:  host OFF; stream waits OFF; copies; records ON; host ON
//   acquire: host ON; XLA's stream waits ON        release: XLA's stream records OFF; host OFF
//
// On the CPU platform handlers run when their operands are computed, so acquire blocks and the host
// halves alone order everything.
//
// The kth acquire of a slot in a run is for its kth job, so compiled programs name the slot only.
// Nothing is ever enqueued on a device that waits for what was not enqueued before: an abort at any
// time leaves no stream waiting.
#ifndef JAXMOE_PREFILL_SLOT_RING_H_
#define JAXMOE_PREFILL_SLOT_RING_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "prefill/pacer.h"
#include "runtime/device_driver.h"
#include "runtime/status.h"

namespace jaxmoe {

struct SlotBuffer {
  uint8_t* data = nullptr;  // device memory
  size_t bytes = 0;
};

// `rows` pieces of `width` bytes into a buffer of the job's slot.
struct SlotCopy {
  int buffer = 0;
  size_t dst_offset = 0;
  const uint8_t* src = nullptr;
  size_t width = 0;
  size_t rows = 1;
  size_t dst_pitch = 0, src_pitch = 0;  // where rows > 1

  size_t bytes() const { return width * rows; }
};

struct SlotJob {
  int slot = 0;
  std::string name;  // for errors: "MoE layer 3, experts 0 to 31"
  std::vector<SlotCopy> copies;
};

struct SlotJobs {
  std::vector<SlotJob> jobs;
  std::vector<std::shared_ptr<const void>> keep;  // the owners of what is copied
  int64_t unlocked_bytes = 0;  // of the sources: those not page-locked when the jobs were made
};

struct SlotRingStats {  // of the present or the last run
  int64_t jobs = 0;     // loaded
  int64_t copies = 0;
  int64_t bytes = 0;
  double copy_s = 0;          // the copy stream's time between a job's first and last byte
  double loader_wait_s = 0;   // the loader waited for the model to enqueue a release
  double acquire_wait_s = 0;  // the model's thread waited in acquire
  int64_t paced_bytes = 0;    // of copies that a pace held back
  double paced_s = 0;         // that these take at their paces
};

class SlotRing {
 public:
  // What an acquire, or finish, waits for while nothing at all moves in the ring; then the run is
  // stuck and fails.
  static constexpr std::chrono::seconds kStall{120};

  // An error where a ring has fewer than two slots, or two buffers share memory.
  static Status create(std::shared_ptr<DeviceDriver> driver,
                       std::vector<std::vector<SlotBuffer>> slots, std::shared_ptr<SlotRing>* ring,
                       std::chrono::nanoseconds stall = kStall);
  ~SlotRing();  // aborts
  SlotRing(const SlotRing&) = delete;
  SlotRing& operator=(const SlotRing&) = delete;

  int num_slots() const { return static_cast<int>(slots_.size()); }
  const std::vector<SlotBuffer>& buffers(int slot) const { return slots_[slot].buffers; }
  DeviceDriver& driver() const { return *driver_; }

  // Checks every job and hands them to the loader. An error while a run is under way; after one
  // that failed, the programs that used it must have ended. Sources that are not page-locked, which
  // a device copies slowly and not asynchronously, are an error unless they are allowed.
  Status start(std::shared_ptr<const SlotJobs> jobs, bool allow_unlocked = false);
  // The slot's next job is in place for what `stream` does from now on; nullptr: for the caller.
  Status acquire(int slot, DeviceStream stream);
  // What `stream` (nullptr: the caller) was given so far reads the slot last.
  Status release(int slot, DeviceStream stream);
  // Waits until every job was loaded, acquired and released, and ends the run.
  Status finish();
  // Ends the run: acquire, release and finish return the cause. On return the loader is idle and
  // its stream empty. Does nothing without a run.
  void abort(const std::string& cause);
  // Copies take no more than this from now on, in this and later runs; 0: as fast as they go. At
  // any time, from any thread: a copy that waits for its turn goes by the new pace at once.
  void set_pace(double bytes_per_s);
  SlotRingStats stats() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Slot {
    std::vector<SlotBuffer> buffers;
    DeviceEvent start = nullptr, on = nullptr, off = nullptr;
    // Of this run. loaded >= acquired >= released.
    int64_t jobs = 0, loaded = 0, acquired = 0, released = 0;
    bool off_recorded = false;
    DeviceStream user = nullptr;  // the stream of the last acquire
  };
  enum class State { kIdle, kRunning };

  SlotRing(std::shared_ptr<DeviceDriver> driver, std::chrono::nanoseconds stall)
      : driver_(std::move(driver)), stall_(stall) {}
  Status check_job(const SlotJob& job, size_t index) const;
  Status check_slot(int slot) const;
  const SlotJob& job_of(int slot, int64_t generation) const;
  void loader_main();
  Status load(const SlotJob& job);
  Status submit(const SlotJob& job);
  Status wait_for_turn(size_t bytes);
  Status retire_oldest();
  void wait_for_device();
  bool all_released() const;
  void moved();
  void fail(const Status& cause);
  // Until done() or the run failed; false, and a failed run, where nothing moved for `stall_`.
  template <typename Done>
  void wait_moving(std::unique_lock<std::mutex>& lock, const char* who, Done done);
  std::string describe_slots() const;

  const std::shared_ptr<DeviceDriver> driver_;
  const std::chrono::nanoseconds stall_;
  DeviceStream stream_ = nullptr;
  std::vector<Slot> slots_;

  mutable std::mutex mutex_;  // guards all below, and the slots' counters
  std::condition_variable changed_;
  State state_ = State::kIdle;  // of the loader
  bool has_run_ = false;        // between start and finish or abort
  bool stop_ = false;
  int calls_ = 0;  // acquires and releases in progress
  uint64_t moves_ = 0;
  Pacer pacer_;
  uint64_t paces_ = 0;  // how often it was changed
  Status failure_;
  std::shared_ptr<const SlotJobs> run_;
  SlotRingStats stats_;

  std::deque<const SlotJob*> in_flight_;  // the loader's own
  std::thread loader_;
};

}  // namespace jaxmoe

#endif  // JAXMOE_PREFILL_SLOT_RING_H_

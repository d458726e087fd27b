// DeviceDriver, PageLock, SlotJobs and SlotRing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bench/copy_rate.h"
#include "bindings/bindings.h"
#include "handlers/registries.h"
#include "prefill/slot_ring.h"
#include "prefill/store_jobs.h"
#include "runtime/cuda_driver.h"
#include "runtime/host_driver.h"

namespace py = pybind11;

namespace jaxmoe {
namespace {

void throw_runtime_error(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;

class DriverBinding {
 public:
  explicit DriverBinding(std::shared_ptr<DeviceDriver> driver) : driver_(std::move(driver)) {}

  static DriverBinding cuda(int ordinal) {
    std::shared_ptr<DeviceDriver> driver;
    Status status;
    {
      py::gil_scoped_release release;  // the primary context may have to be made
      status = create_cuda_driver(ordinal, &driver);
    }
    throw_os_error(status);
    return DriverBinding(std::move(driver));
  }
  static DriverBinding host(double bytes_per_s, double max_delay_s, uint64_t seed,
                            int64_t max_registered_bytes, bool copies_need_registered) {
    return DriverBinding(std::make_shared<HostDriver>(HostDriverOptions{
        bytes_per_s, max_delay_s, seed, max_registered_bytes, copies_need_registered}));
  }

  std::shared_ptr<DeviceDriver> get() const { return driver_; }
  HostDriver& host_driver() const {
    auto* host = dynamic_cast<HostDriver*>(driver_.get());
    if (host == nullptr) throw py::value_error("this is for a driver made by DeviceDriver.host()");
    return *host;
  }
  std::pair<int64_t, int64_t> memory_info() const {
    int64_t free = 0, total = 0;
    throw_os_error(driver_->memory_info(&free, &total));
    return {free, total};
  }
  std::vector<double> measure_copies(uintptr_t address, Bytes array, int repeats,
                                     bool to_device) const {
    auto* host = to_device ? const_cast<void*>(static_cast<const py::array&>(array).data())
                           : array.mutable_data();
    const auto bytes = static_cast<size_t>(array.nbytes());
    std::vector<double> rates;
    Status status;
    {
      py::gil_scoped_release release;
      status = copy_rate(*driver_, reinterpret_cast<void*>(address), host, bytes, repeats,
                         to_device, &rates);
    }
    throw_os_error(status);
    return rates;
  }

 private:
  std::shared_ptr<DeviceDriver> driver_;
};

// A reference to a Python object that any thread may drop.
std::shared_ptr<const void> kept(const Bytes& array) {
  return {new py::object(array), [](const void* pointer) {
            py::gil_scoped_acquire acquire;
            delete static_cast<const py::object*>(pointer);
          }};
}

class LockBinding {
 public:
  LockBinding(py::handle driver, std::vector<std::pair<std::string, Bytes>> arrays,
              const py::object& progress) {
    std::shared_ptr<DeviceDriver> on = driver_of(driver);
    std::vector<MemoryRange> ranges;
    auto held = std::make_shared<Held>();
    for (const auto& [name, array] : arrays) {
      ranges.push_back(
          {name,
           static_cast<uint8_t*>(const_cast<void*>(static_cast<const py::array&>(array).data())),
           static_cast<size_t>(array.nbytes()), !array.writeable()});
      held->arrays.push_back(kept(array));
    }
    throw_os_error(with_progress(progress, [&](const PageLock::Progress& report) {
      return PageLock::create(on, ranges, report, &held->lock);
    }));
    lock_ = std::shared_ptr<PageLock>(held, held->lock.get());
  }
  ~LockBinding() { close(); }
  void close() {
    py::gil_scoped_release release;
    lock_ = nullptr;
  }
  std::shared_ptr<PageLock> get() const { return lock_; }

 private:
  struct Held {
    std::vector<std::shared_ptr<const void>> arrays;
    std::unique_ptr<PageLock> lock;  // undone before the arrays go
  };
  std::shared_ptr<PageLock> lock_;
};

class JobsBinding {
 public:
  void add_experts(py::handle store, int slot, int layer, int first_expert, int num_experts) {
    throw_value_error(append_store_jobs(store_of(store), {{slot, layer, first_expert, num_experts}},
                                        jobs_.get()));
  }

  // Each part: buffer, offset in it, what to copy there. lock: a PageLock of the arrays, or None.
  void add_arrays(int slot, const std::string& name,
                  const std::vector<std::tuple<int, size_t, Bytes>>& parts,
                  const LockBinding* lock) {
    std::shared_ptr<PageLock> locked = lock != nullptr ? lock->get() : nullptr;
    SlotJob job;
    job.slot = slot;
    job.name = name;
    for (const auto& [buffer, offset, array] : parts) {
      const auto bytes = static_cast<size_t>(array.nbytes());
      append_cut(buffer, offset, array.data(), bytes, locked.get(), &job.copies);
      if (locked == nullptr || locked->run_length(array.data()) == 0) {
        jobs_->unlocked_bytes += static_cast<int64_t>(bytes);
      }
      jobs_->keep.push_back(kept(array));
    }
    jobs_->jobs.push_back(std::move(job));
    if (locked != nullptr) jobs_->keep.push_back(locked);
  }

  size_t size() const { return jobs_->jobs.size(); }
  int64_t total_bytes() const {
    int64_t bytes = 0;
    for (const SlotJob& job : jobs_->jobs) {
      for (const SlotCopy& copy : job.copies) bytes += static_cast<int64_t>(copy.bytes());
    }
    return bytes;
  }
  int64_t num_copies() const {
    int64_t copies = 0;
    for (const SlotJob& job : jobs_->jobs) copies += static_cast<int64_t>(job.copies.size());
    return copies;
  }
  int64_t unlocked_bytes() const { return jobs_->unlocked_bytes; }
  // A copy: a run's jobs do not change.
  std::shared_ptr<const SlotJobs> get() const { return std::make_shared<SlotJobs>(*jobs_); }

 private:
  std::shared_ptr<SlotJobs> jobs_ = std::make_shared<SlotJobs>();
};

class RingBinding {
 public:
  // Of each slot its buffers: device address and bytes.
  RingBinding(py::handle driver,
              const std::vector<std::vector<std::pair<uintptr_t, size_t>>>& slots, double stall_s) {
    std::vector<std::vector<SlotBuffer>> buffers;
    for (const auto& slot : slots) {
      buffers.emplace_back();
      for (auto [address, bytes] : slot) {
        buffers.back().push_back({reinterpret_cast<uint8_t*>(address), bytes});
      }
    }
    const auto stall = std::chrono::duration_cast<std::chrono::nanoseconds>(
        std::chrono::duration<double>(stall_s));
    throw_value_error(SlotRing::create(driver_of(driver), std::move(buffers), &ring_, stall));
  }
  ~RingBinding() { close(); }

  void close() {
    if (ring_ == nullptr) return;
    py::gil_scoped_release release;       // joins the loader, which may drop Python objects
    ring_->abort("the ring was closed");  // a group may still hold it
    ring_.reset();
  }
  std::shared_ptr<SlotRing> get() const {
    if (ring_ == nullptr) throw py::value_error("the slot ring is closed");
    return ring_;
  }

  void start(const JobsBinding& jobs, bool allow_unlocked) const {
    std::shared_ptr<SlotRing> ring = get();
    std::shared_ptr<const SlotJobs> run = jobs.get();
    Status status;
    {
      py::gil_scoped_release release;
      status = ring->start(std::move(run), allow_unlocked);
    }
    throw_value_error(status);
  }
  void finish() const {
    std::shared_ptr<SlotRing> ring = get();
    Status status;
    {
      py::gil_scoped_release release;
      status = ring->finish();
    }
    throw_runtime_error(status);
  }
  void abort(const std::string& cause) const {
    std::shared_ptr<SlotRing> ring = get();
    py::gil_scoped_release release;
    ring->abort(cause);
  }
  void set_pace(double bytes_per_s) const {
    if (!(bytes_per_s >= 0)) throw py::value_error("a pace is 0 or more bytes a second");
    get()->set_pace(bytes_per_s);
  }
  py::dict stats() const {
    const SlotRingStats stats = get()->stats();
    py::dict result;
    result["jobs"] = stats.jobs;
    result["copies"] = stats.copies;
    result["bytes"] = stats.bytes;
    result["copy_s"] = stats.copy_s;
    result["loader_wait_s"] = stats.loader_wait_s;
    result["acquire_wait_s"] = stats.acquire_wait_s;
    result["paced_bytes"] = stats.paced_bytes;
    result["paced_s"] = stats.paced_s;
    return result;
  }

 private:
  std::shared_ptr<SlotRing> ring_;
};

// What programs name: a ring, or one ring a device.
class GroupBinding {
 public:
  explicit GroupBinding(const std::vector<std::pair<int, const RingBinding*>>& rings) {
    group_ = std::make_shared<SlotRingGroup>();
    for (auto [ordinal, ring] : rings) group_->rings.push_back({ordinal, ring->get()});
    id_ = slot_rings().add(group_);
    if (id_ < 0) throw_value_error(Status::error("too many slot rings are open: close some"));
  }
  ~GroupBinding() { close(); }
  void close() {
    if (group_ == nullptr) return;
    slot_rings().remove(id_, group_.get());
    py::gil_scoped_release release;
    group_.reset();
  }
  int id() const {
    if (group_ == nullptr) throw py::value_error("the slot ring is closed");
    return id_;
  }

 private:
  std::shared_ptr<SlotRingGroup> group_;
  int id_ = -1;
};

}  // namespace

std::shared_ptr<DeviceDriver> driver_of(py::handle driver) {
  return driver.cast<DriverBinding&>().get();
}

Status with_progress(const py::object& function,
                     const std::function<Status(const PageLock::Progress&)>& lock) {
  std::exception_ptr raised;
  PageLock::Progress report;
  if (!function.is_none()) {
    report = [&](int64_t done, int64_t total) {
      py::gil_scoped_acquire acquire;
      try {
        function(done, total);
        return true;
      } catch (py::error_already_set&) {
        raised = std::current_exception();
        return false;
      }
    };
  }
  Status status;
  {
    py::gil_scoped_release release;
    status = lock(report);
  }
  if (raised) std::rethrow_exception(raised);
  return status;
}

void bind_device(py::module_& module) {
  py::class_<DriverBinding>(module, "DeviceDriver")
      .def_static("cuda", &DriverBinding::cuda, py::arg("ordinal"))
      .def_static("host", &DriverBinding::host, py::arg("bytes_per_s") = 0.0,
                  py::arg("max_delay_s") = 0.0, py::arg("seed") = 1,
                  py::arg("max_registered_bytes") = -1, py::arg("copies_need_registered") = false)
      .def(
          "limit_rate",
          [](const DriverBinding& d, double rate) { d.host_driver().limit_rate(rate); },
          py::arg("bytes_per_s"))
      .def_property_readonly("is_host", [](const DriverBinding& d) { return d.get()->is_host(); })
      .def_property_readonly("supports_values",
                             [](const DriverBinding& d) { return d.get()->supports_values(); })
      .def("describe", [](const DriverBinding& d) { return d.get()->describe(); })
      .def("memory_info", &DriverBinding::memory_info)
      .def("copy_rate", &DriverBinding::measure_copies, py::arg("address"), py::arg("array"),
           py::arg("repeats"), py::arg("to_device"))
      .def(
          "fail_copy",
          [](const DriverBinding& d, int64_t nth, bool at_submission, std::string cause) {
            d.host_driver().fail_copy(nth, at_submission, std::move(cause));
          },
          py::arg("nth"), py::arg("at_submission"), py::arg("cause"))
      .def(
          "allow_destination",
          [](const DriverBinding& d, uintptr_t address, size_t bytes) {
            d.host_driver().allow_destination(reinterpret_cast<const void*>(address), bytes);
          },
          py::arg("address"), py::arg("num_bytes"))
      .def("violations", [](const DriverBinding& d) { return d.host_driver().violations(); })
      .def_property_readonly("registered_bytes", [](const DriverBinding& d) {
        return d.host_driver().registered_bytes();
      });
  py::class_<LockBinding>(module, "PageLock")
      .def(py::init<py::handle, std::vector<std::pair<std::string, Bytes>>, const py::object&>(),
           py::arg("driver"), py::arg("arrays"), py::arg("progress") = py::none())
      .def("close", &LockBinding::close);
  py::class_<JobsBinding>(module, "SlotJobs")
      .def(py::init<>())
      .def("add_experts", &JobsBinding::add_experts, py::arg("store"), py::arg("slot"),
           py::arg("layer"), py::arg("first_expert"), py::arg("num_experts"))
      .def("add_arrays", &JobsBinding::add_arrays, py::arg("slot"), py::arg("name"),
           py::arg("parts"), py::arg("lock") = py::none())
      .def("__len__", &JobsBinding::size)
      .def_property_readonly("total_bytes", &JobsBinding::total_bytes)
      .def_property_readonly("num_copies", &JobsBinding::num_copies)
      .def_property_readonly("unlocked_bytes", &JobsBinding::unlocked_bytes);
  py::class_<RingBinding>(module, "SlotRing")
      .def(py::init<py::handle, const std::vector<std::vector<std::pair<uintptr_t, size_t>>>&,
                    double>(),
           py::arg("driver"), py::arg("slots"), py::arg("stall_s"))
      .def("start", &RingBinding::start, py::arg("jobs"), py::arg("allow_unlocked"))
      .def("finish", &RingBinding::finish)
      .def("abort", &RingBinding::abort, py::arg("cause"))
      .def("set_pace", &RingBinding::set_pace, py::arg("bytes_per_s"))
      .def("stats", &RingBinding::stats)
      .def("close", &RingBinding::close);
  py::class_<GroupBinding>(module, "SlotRingGroup")
      .def(py::init<const std::vector<std::pair<int, const RingBinding*>>&>(), py::arg("rings"))
      .def_property_readonly("id", &GroupBinding::id)
      .def("close", &GroupBinding::close);
}

}  // namespace jaxmoe

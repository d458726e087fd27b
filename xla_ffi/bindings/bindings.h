// What the files of the extension module share.
#ifndef JAXMOE_BINDINGS_BINDINGS_H_
#define JAXMOE_BINDINGS_BINDINGS_H_

#include <pybind11/pybind11.h>

#include <functional>
#include <memory>
#include <string>

#include "kernels/kernels.h"
#include "runtime/cpu_runtime.h"
#include "runtime/device_driver.h"
#include "runtime/host_store.h"
#include "runtime/page_lock.h"
#include "runtime/status.h"
#include "runtime/topology.h"

namespace jaxmoe {

inline void throw_value_error(const Status& status) {
  if (!status.ok()) throw pybind11::value_error(status.message());
}

inline void throw_os_error(const Status& status) {
  if (status.ok()) return;
  PyErr_SetString(PyExc_OSError, status.message().c_str());
  throw pybind11::error_already_set();
}

// A name of kernels/formats.h; a ValueError for others.
WeightFormat format_from_name(const std::string& name);
// Of an open runtime object; throws when it is closed.
const Topology& topology_of(pybind11::handle runtime);
std::shared_ptr<CpuRuntime> cpu_of(pybind11::handle runtime);
// The store of an open HostStore object, the driver of a DeviceDriver; throw when they are closed.
std::shared_ptr<HostStore> store_of(pybind11::handle store);
std::shared_ptr<DeviceDriver> driver_of(pybind11::handle driver);
// Runs `lock` without the GIL; its progress calls the function (or None) with it, whose exception
// ends it and is passed on.
Status with_progress(const pybind11::object& function,
                     const std::function<Status(const PageLock::Progress&)>& lock);
void bind_bench(pybind11::module_& module);
void bind_host_store(pybind11::module_& module);
void bind_device(pybind11::module_& module);

}  // namespace jaxmoe

#endif  // JAXMOE_BINDINGS_BINDINGS_H_

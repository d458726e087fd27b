// The measuring loops of bench/ for Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bench/kernel_loop.h"
#include "bench/peak.h"
#include "bench/read_bandwidth.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace jaxmoe {
namespace {

// The CPUs that the runtime's participants use, so that a ceiling is that of the same threads; of
// one node, or -1: of all.
std::vector<int> cpus_of(const CpuRuntime& runtime, int node = -1) {
  std::vector<int> cpus;
  for (const Placement& place : place_threads(runtime.topology(), runtime.num_threads())) {
    if (node < 0 || place.node == node) cpus.push_back(place.cpu);
  }
  return cpus;
}

std::vector<double> bandwidth(py::handle runtime, int64_t total_bytes, int repeats, int node) {
  const std::vector<int> cpus = cpus_of(*cpu_of(runtime), node);
  if (cpus.empty()) {
    throw py::value_error("the runtime has no thread on node " + std::to_string(node));
  }
  py::gil_scoped_release release;
  return read_bandwidth(cpus, total_bytes, repeats);
}

std::vector<std::pair<std::string, std::vector<double>>> peaks(py::handle runtime, int repeats) {
  std::shared_ptr<CpuRuntime> cpu = cpu_of(runtime);
  const std::vector<int> cpus = cpus_of(*cpu);
  py::gil_scoped_release release;
  std::vector<std::pair<std::string, std::vector<double>>> result;
  for (const PeakLoop& loop : peak_loops(cpu->isa())) {
    result.emplace_back(loop.name, peak_flops(loop, cpus, repeats));
  }
  return result;
}

Family checked_family(int64_t family) {
  if (family != 0 && family != 1) {
    throw py::value_error("family is " + std::to_string(family) + "; wanted 0 or 1");
  }
  return static_cast<Family>(family);
}

py::tuple as_tuple(const Measured& measured) {
  return py::make_tuple(measured.seconds, measured.bytes, measured.flops);
}

py::tuple bench_kernel(py::handle runtime, py::handle store, int layer, int64_t family,
                       bool bf16_activations, int num_experts, int64_t rows, int repeats) {
  std::shared_ptr<CpuRuntime> cpu = cpu_of(runtime);
  std::shared_ptr<HostStore> weights = store_of(store);
  Measured measured;
  Status status;
  {
    py::gil_scoped_release release;
    status = measure_kernel(*cpu, *weights, layer, checked_family(family),
                            bf16_activations ? ActivationType::kBf16 : ActivationType::kF32,
                            num_experts, rows, repeats, &measured);
  }
  throw_value_error(status);
  return as_tuple(measured);
}

py::tuple bench_experts(py::handle runtime, py::handle store, int layer, int64_t family,
                        bool bf16_activations,
                        const py::array_t<int32_t, py::array::c_style | py::array::forcecast>& ids,
                        int repeats) {
  if (ids.ndim() != 3) {
    throw py::value_error("ids have " + std::to_string(ids.ndim()) +
                          " dimensions; wanted [calls, tokens, experts per token]");
  }
  std::shared_ptr<CpuRuntime> cpu = cpu_of(runtime);
  std::shared_ptr<HostStore> weights = store_of(store);
  Measured measured;
  Status status;
  {
    py::gil_scoped_release release;
    status =
        measure_experts(*cpu, *weights, layer, checked_family(family),
                        bf16_activations ? ActivationType::kBf16 : ActivationType::kF32,
                        ids.shape(1), ids.shape(2), ids.data(), ids.shape(0), repeats, &measured);
  }
  throw_value_error(status);
  return as_tuple(measured);
}

py::tuple bench_empty_job(py::handle runtime, int64_t calls, int repeats) {
  std::shared_ptr<CpuRuntime> cpu = cpu_of(runtime);
  Measured measured;
  Status status;
  {
    py::gil_scoped_release release;
    status = measure_empty_job(*cpu, calls, repeats, &measured);
  }
  throw_value_error(status);
  return as_tuple(measured);
}

}  // namespace

void bind_bench(py::module_& module) {
  module.def("read_bandwidth", &bandwidth, py::arg("runtime"), py::arg("total_bytes"),
             py::arg("repeats"), py::arg("node") = -1);
  module.def("peak_flops", &peaks, py::arg("runtime"), py::arg("repeats"));
  module.def("measure_kernel", &bench_kernel, py::arg("runtime"), py::arg("store"),
             py::arg("layer"), py::arg("family"), py::arg("bf16_activations"),
             py::arg("num_experts"), py::arg("rows"), py::arg("repeats"));
  module.def("measure_empty_job", &bench_empty_job, py::arg("runtime"), py::arg("calls"),
             py::arg("repeats"));
  module.def("measure_experts", &bench_experts, py::arg("runtime"), py::arg("store"),
             py::arg("layer"), py::arg("family"), py::arg("bf16_activations"), py::arg("ids"),
             py::arg("repeats"));
}

}  // namespace jaxmoe

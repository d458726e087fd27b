// The extension module: CpuRuntime, HostStore and the FFI handlers, with Python's exceptions for
// their errors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "handlers/checks.h"
#include "handlers/handlers.h"
#include "handlers/registries.h"

namespace py = pybind11;

namespace jaxmoe {
namespace {

class RuntimeBinding {
 public:
  RuntimeBinding(int num_threads, std::optional<std::vector<std::vector<int>>> numa_nodes,
                 std::optional<std::string> isa, std::optional<std::string> device_signal) {
    std::optional<DeviceSignal> signal;
    if (device_signal) signal = signal_from_name(*device_signal);
    RuntimeOptions options;
    options.num_threads = num_threads;
    options.fake_nodes = std::move(numa_nodes);
    if (isa) options.isa = isa_from_name(*isa);
    std::shared_ptr<CpuRuntime> cpu;
    Status status;
    {
      py::gil_scoped_release release;
      status = CpuRuntime::create(options, &cpu);
    }
    throw_value_error(status);
    runtime_ = std::make_shared<NativeRuntime>(std::move(cpu), signal);
    id_ = runtimes().add(runtime_);
    if (id_ < 0) throw_value_error(Status::error("too many runtimes are open: close some"));
  }
  ~RuntimeBinding() { close(); }

  void close() {
    if (runtime_ == nullptr) return;
    runtimes().remove(id_, runtime_.get());
    py::gil_scoped_release release;  // joins the workers
    runtime_.reset();
  }
  NativeRuntime& get() const {
    if (runtime_ == nullptr) throw py::value_error("the runtime is closed");
    return *runtime_;
  }
  int id() const {
    get();
    return id_;
  }

  static DeviceSignal signal_from_name(const std::string& name) {
    if (name == "values") return DeviceSignal::kValues;
    if (name == "host_functions") return DeviceSignal::kHostFunctions;
    throw py::value_error("device_signal is \"" + name +
                          "\"; wanted \"values\" or \"host_functions\"");
  }
  static Isa isa_from_name(const std::string& name) {
    std::string known;
    for (int i = 0; i < kNumIsas; ++i) {
      Isa isa = static_cast<Isa>(i);
      if (name == isa_name(isa)) return isa;
      known += std::string(i ? ", " : "") + isa_name(isa);
    }
    throw py::value_error("isa is \"" + name + "\"; wanted one of " + known);
  }

 private:
  std::shared_ptr<NativeRuntime> runtime_;
  int id_ = -1;
};

std::string kernel_name(const RuntimeBinding& binding, int64_t family,
                        const std::string& weight_format, bool bf16_activations) {
  std::optional<Family> kind = family_of(family);
  if (!kind) throw py::value_error("family is " + std::to_string(family) + "; wanted 0 or 1");
  return binding.get()
      .cpu
      ->kernel(*kind, format_from_name(weight_format),
               bf16_activations ? ActivationType::kBf16 : ActivationType::kF32)
      .name;
}

py::dict stats(const RuntimeBinding& binding) {
  RuntimeStats& stats = binding.get().cpu->stats();
  py::dict result;
  result["experts_calls"] = stats.experts_calls.load();
  result["experts_distinct"] = stats.experts_distinct.load();
  result["experts_weight_bytes"] = stats.experts_weight_bytes.load();
  result["linear_calls"] = stats.linear_calls.load();
  result["linear_weight_bytes"] = stats.linear_weight_bytes.load();
  result["attention_calls"] = stats.attention_calls.load();
  result["attention_kv_bytes"] = stats.attention_kv_bytes.load();
  result["experts_flops"] = stats.experts_flops.load();
  result["linear_flops"] = stats.linear_flops.load();
  result["attention_flops"] = stats.attention_flops.load();
  const char* const names[] = {"experts", "linear", "attention"};
  PartTimes& times = binding.get().cpu->tracer().times();
  for (int part = 0; part < 3; ++part) {
    result[(std::string(names[part]) + "_ns").c_str()] = times.operation_ns[part].load();
    result[(std::string(names[part]) + "_busy_ns").c_str()] = times.busy_ns[part].load();
  }
  result["program_ns"] = times.program_ns.load();
  result["sampling_ns"] = times.sampling_ns.load();
  return result;
}

void set_trace_level(const RuntimeBinding& binding, int level) {
  if (level < 0 || level > 2) {
    throw py::value_error("level is " + std::to_string(level) + "; wanted 0, 1 or 2");
  }
  binding.get().cpu->tracer().set_level(static_cast<TraceLevel>(level));
}

// [(track, int64 [n, 5] of begin, end, kind, part, detail, dropped)]
py::list take_trace(const RuntimeBinding& binding) {
  std::vector<Tracer::Taken> taken;
  {
    py::gil_scoped_release release;
    taken = binding.get().cpu->tracer().take();
  }
  py::list result;
  for (const Tracer::Taken& track : taken) {
    py::array_t<int64_t> events({static_cast<py::ssize_t>(track.events.size()), py::ssize_t{5}});
    auto at = events.mutable_unchecked<2>();
    for (py::ssize_t i = 0; i < at.shape(0); ++i) {
      const TraceEvent& event = track.events[static_cast<size_t>(i)];
      at(i, 0) = event.begin_ns;
      at(i, 1) = event.end_ns;
      at(i, 2) = static_cast<int64_t>(event.kind);
      at(i, 3) = static_cast<int64_t>(event.part);
      at(i, 4) = event.detail;
    }
    result.append(py::make_tuple(track.track, events, track.dropped));
  }
  return result;
}

py::dict device_stats(const RuntimeBinding& binding) {
  ExpertsDevice* device = binding.get().device_experts_if_any();
  const DeviceStats stats = device == nullptr ? DeviceStats() : device->stats();
  py::dict result;
  result["calls"] = stats.calls;
  result["experts_s"] = stats.experts_s;
  result["idle_s"] = stats.idle_s;
  return result;
}

void check_device(const RuntimeBinding& binding) {
  ExpertsDevice* device = binding.get().device_experts_if_any();
  if (device != nullptr) throw_value_error(device->take_error());
}

std::string describe_device(const RuntimeBinding& binding) {
  ExpertsDevice* device = binding.get().device_experts_if_any();
  return device == nullptr ? std::string() : device->describe();
}

py::dict handlers() {
  py::dict result;
  auto add = [&result](const char* name, XLA_FFI_Handler* handler) {
    result[name] = py::capsule(reinterpret_cast<void*>(handler));
  };
  add("jaxmoe_linear", JaxmoeLinear);
  add("jaxmoe_head_linear", JaxmoeHeadLinear);
  add("jaxmoe_experts", JaxmoeExperts);
  add("jaxmoe_experts_group", JaxmoeExpertsGroup);
  add("jaxmoe_experts_submit", JaxmoeExpertsSubmit);
  add("jaxmoe_experts_submit_packed", JaxmoeExpertsSubmitPacked);
  add("jaxmoe_experts_wait", JaxmoeExpertsWait);
  add("jaxmoe_kv_write", JaxmoeKvWrite);
  add("jaxmoe_paged_attention", JaxmoePagedAttention);
  add("jaxmoe_mark", JaxmoeMark);
  add("jaxmoe_gated_delta", JaxmoeGatedDelta);
  add("jaxmoe_index_select", JaxmoeIndexSelect);
  add("jaxmoe_slot_acquire", JaxmoeSlotAcquire);
  add("jaxmoe_slot_release", JaxmoeSlotRelease);
  return result;
}

py::dict cuda_handlers() {
  py::dict result;
  auto add = [&result](const char* name, XLA_FFI_Handler* handler) {
    result[name] = py::capsule(reinterpret_cast<void*>(handler));
  };
  add("jaxmoe_slot_acquire", JaxmoeSlotAcquireCuda);
  add("jaxmoe_slot_release", JaxmoeSlotReleaseCuda);
  add("jaxmoe_experts", JaxmoeExpertsCuda);
  add("jaxmoe_experts_submit", JaxmoeExpertsSubmitCuda);
  add("jaxmoe_experts_submit_packed", JaxmoeExpertsSubmitPackedCuda);
  add("jaxmoe_experts_wait", JaxmoeExpertsWaitCuda);
  return result;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumIsas; ++i) {
    if (isa_supported(static_cast<Isa>(i))) names.push_back(isa_name(static_cast<Isa>(i)));
  }
  return names;
}

}  // namespace

const Topology& topology_of(py::handle runtime) { return cpu_of(runtime)->topology(); }

std::shared_ptr<CpuRuntime> cpu_of(py::handle runtime) {
  return runtime.cast<RuntimeBinding&>().get().cpu;
}

}  // namespace jaxmoe

PYBIND11_MODULE(_native, module) {
  using jaxmoe::RuntimeBinding;
  module.doc() = "Native core of jaxmoe: CPU runtime, expert store and XLA FFI handlers.";
  py::class_<RuntimeBinding>(module, "Runtime")
      .def(py::init<int, std::optional<std::vector<std::vector<int>>>, std::optional<std::string>,
                    std::optional<std::string>>(),
           py::arg("num_threads") = 0, py::arg("numa_nodes") = py::none(),
           py::arg("isa") = py::none(), py::arg("device_signal") = py::none())
      .def_property_readonly("id", &RuntimeBinding::id)
      .def_property_readonly("num_threads",
                             [](const RuntimeBinding& r) { return r.get().cpu->num_threads(); })
      .def_property_readonly("num_nodes",
                             [](const RuntimeBinding& r) { return r.get().cpu->num_nodes(); })
      .def_property_readonly(
          "isa", [](const RuntimeBinding& r) { return jaxmoe::isa_name(r.get().cpu->isa()); })
      .def("describe", [](const RuntimeBinding& r) { return r.get().cpu->describe(); })
      .def("kernel_name", &jaxmoe::kernel_name, py::arg("family"), py::arg("weight_format"),
           py::arg("bf16_activations"))
      .def("stats", &jaxmoe::stats)
      .def_property_readonly("few_tokens",
                             [](const RuntimeBinding& r) { return r.get().cpu->few_tokens(); })
      .def(
          "set_few_tokens",
          [](const RuntimeBinding& r, int64_t tokens) { r.get().cpu->set_few_tokens(tokens); },
          py::arg("tokens"))
      .def("set_trace_level", &jaxmoe::set_trace_level, py::arg("level"))
      .def("take_trace", &jaxmoe::take_trace)
      .def("device_stats", &jaxmoe::device_stats)
      .def("check_device", &jaxmoe::check_device)
      .def("describe_device", &jaxmoe::describe_device)
      .def("close", &RuntimeBinding::close);
  jaxmoe::bind_host_store(module);
  jaxmoe::bind_device(module);
  jaxmoe::bind_bench(module);
  module.def("handlers", &jaxmoe::handlers);
  module.def("cuda_handlers", &jaxmoe::cuda_handlers);
  module.def("supported_isas", &jaxmoe::supported_isas);
}

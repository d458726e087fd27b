#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "handlers/registries.h"
#include "kernels/formats.h"
#include "runtime/host_store.h"

namespace py = pybind11;

namespace jaxmoe {
namespace {

using LayerTuple = std::tuple<int64_t, int64_t, int64_t, std::string>;

Backing backing_from_name(const std::string& name) {
  if (name == "arena") return Backing::kArena;
  if (name == "mmap") return Backing::kMmap;
  throw py::value_error("backing is \"" + name + "\"; wanted \"arena\" or \"mmap\"");
}

// By NumPy's name, of a type that it knows only where ml_dtypes was imported; bytes are what the
// layer's format (`wanted`) has bytes for.
ScaleType scale_type_of(const py::dtype& dtype, ScaleType wanted) {
  const std::string name = py::str(dtype.attr("name"));
  if (name == "float32") return ScaleType::kF32;
  if (name == "bfloat16") return ScaleType::kBf16;
  if (name == "uint32") return ScaleType::kF32Zero;
  if (name == "uint8") {
    return wanted == ScaleType::kE4m3 ? ScaleType::kE4m3 : ScaleType::kE8m0;
  }
  throw py::value_error("scale is " + name +
                        "; wanted float32, bfloat16, uint32 (with zero points) or uint8");
}

py::dtype dtype_of(ScaleType type) {
  switch (type) {
    case ScaleType::kBf16:
      return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
    case ScaleType::kE8m0:
    case ScaleType::kE4m3:
      return py::dtype::of<uint8_t>();
    case ScaleType::kF32Zero:
      return py::dtype::of<uint32_t>();
    default:
      return py::dtype::of<float>();
  }
}

py::array read_only(py::array array) {
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}

// A NumPy view of bytes of the store's memory that keeps the store alive.
py::array view_of(std::shared_ptr<HostStore> store, const uint8_t* data, int64_t rows, int64_t cols,
                  bool writable) {
  py::capsule owner(new std::shared_ptr<HostStore>(std::move(store)),
                    [](void* p) { delete static_cast<std::shared_ptr<HostStore>*>(p); });
  py::array_t<uint8_t> array({rows, cols}, {cols, int64_t{1}}, data, owner);
  return writable ? py::array(std::move(array)) : read_only(std::move(array));
}

class StoreBinding {
 public:
  StoreBinding(py::handle runtime, const std::vector<LayerTuple>& layers,
               const std::string& backing, const std::string& shared_name,
               const std::string& fingerprint) {
    std::vector<ExpertLayerSpec> specs;
    for (const auto& [num_experts, intermediate, hidden, format] : layers) {
      specs.push_back({num_experts, intermediate, hidden, format_from_name(format)});
    }
    SharedName shared{shared_name, {}};
    if (!shared_name.empty()) {
      if (fingerprint.size() != shared.fingerprint.size()) {
        throw py::value_error("fingerprint has " + std::to_string(fingerprint.size()) +
                              " bytes; wanted " + std::to_string(shared.fingerprint.size()));
      }
      std::copy(fingerprint.begin(), fingerprint.end(), shared.fingerprint.begin());
    }
    throw_value_error(HostStore::create(topology_of(runtime), std::move(specs),
                                        backing_from_name(backing), &store_,
                                        shared_name.empty() ? nullptr : &shared));
    id_ = stores().add(store_);
    if (id_ < 0) throw_value_error(Status::error("too many host stores are open: close some"));
  }
  ~StoreBinding() { close(); }

  void close() {
    if (store_ == nullptr) return;
    stores().remove(id_, store_.get());
    py::gil_scoped_release release;  // unmapping a large arena takes a while
    store_.reset();
  }

  // A reference of its own: another thread may close the store meanwhile.
  std::shared_ptr<HostStore> get() const {
    if (store_ == nullptr) throw py::value_error("the host store is closed");
    return store_;
  }
  std::shared_ptr<HostStore> at(int64_t layer, int64_t expert, int64_t which) const {
    std::shared_ptr<HostStore> store = get();
    throw_value_error(store->check_index(layer, expert, which));
    return store;
  }
  int id() const {
    get();
    return id_;
  }

  void read_matrix(int layer, int expert, int which, int fd, int64_t offset) const {
    std::shared_ptr<HostStore> store = at(layer, expert, which);
    if (store->backing() != Backing::kArena) {
      throw py::value_error(
          "read_matrix fills the arena; this store maps its files: use set_mapped");
    }
    Status status;
    {
      py::gil_scoped_release release;
      status = store->read_matrix(layer, expert, static_cast<Matrix>(which), fd, offset);
    }
    throw_os_error(status);
  }

  int map_file(const std::string& path) const {
    std::shared_ptr<HostStore> store = get();
    if (store->backing() != Backing::kMmap) {
      throw py::value_error(
          "map_file is for mmap backing; this store has an arena: use read_matrix");
    }
    int index = -1;
    Status status;
    {
      py::gil_scoped_release release;
      status = store->map_file(path, &index);
    }
    throw_os_error(status);
    return index;
  }

  void set_mapped(int layer, int expert, int which, int file_idx, int64_t offset) const {
    std::shared_ptr<HostStore> store = at(layer, expert, which);
    Status status;
    {
      py::gil_scoped_release release;
      status = store->set_mapped(layer, expert, static_cast<Matrix>(which), file_idx, offset);
    }
    throw_value_error(status);
  }

  void set_scale(int layer, int expert, int which, const py::array& scale) const {
    std::shared_ptr<HostStore> store = at(layer, expert, which);
    if (scale.ndim() != 2) {
      throw py::value_error("scale has " + std::to_string(scale.ndim()) + " dimensions; wanted 2");
    }
    if (!(scale.flags() & py::array::c_style)) {
      throw py::value_error("scale is no C-contiguous array: use numpy.ascontiguousarray");
    }
    const ScaleType type =
        scale_type_of(scale.dtype(), format_info(store->layer(layer).format).scale_type);
    throw_value_error(store->set_scale(layer, expert, static_cast<Matrix>(which), type,
                                       scale.data(), scale.shape(0), scale.shape(1)));
  }

  // Of every node: (first row, end row, uint8 [rows, row_bytes]); writable where the store owns the
  // memory.
  py::list segments(int layer, int expert, int which) const {
    std::shared_ptr<HostStore> store = at(layer, expert, which);
    const Matrix matrix = static_cast<Matrix>(which);
    const bool writable = store->is_writable();
    if (!writable) throw_value_error(store->check_has_data(layer, expert, matrix));
    throw_os_error(store->reserve(layer, expert, matrix));
    py::list result;
    for (int node = 0; node < store->num_nodes(); ++node) {
      auto [begin, end] = node_rows(store->rows(layer, matrix), node, store->num_nodes());
      if (begin == end) continue;
      const WeightView view = store->view(layer, expert, matrix, node);
      result.append(py::make_tuple(begin, end,
                                   view_of(store, view.data + begin * view.row_stride_bytes,
                                           end - begin, view.row_stride_bytes, writable)));
    }
    return result;
  }

  py::object matrix(int layer, int expert, int which) const {
    std::shared_ptr<HostStore> store = at(layer, expert, which);
    if (store->backing() == Backing::kArena && store->num_nodes() != 1) {
      throw py::value_error("the store's matrices are split over " +
                            std::to_string(store->num_nodes()) + " NUMA nodes: use segments()");
    }
    const Matrix matrix = static_cast<Matrix>(which);
    const bool writable = store->is_writable();
    if (!writable) throw_value_error(store->check_has_data(layer, expert, matrix));
    throw_os_error(store->reserve(layer, expert, matrix));
    const WeightView view = store->view(layer, expert, matrix, 0);
    return view_of(store, view.data, view.n, view.row_stride_bytes, writable);
  }

  void mark_loaded(int layer, int expert, int which) const {
    std::shared_ptr<HostStore> store = at(layer, expert, which);
    throw_value_error(store->mark_loaded(layer, expert, static_cast<Matrix>(which)));
  }

  bool is_loaded(int layer, int expert, int which) const {
    return at(layer, expert, which)->is_loaded(layer, expert, static_cast<Matrix>(which));
  }

  void seal() const { throw_value_error(get()->seal()); }

  // An OSError where the machine refuses.
  void lock_pages(py::handle driver, const py::object& progress) const {
    std::shared_ptr<HostStore> store = get();
    std::shared_ptr<DeviceDriver> on = driver_of(driver);
    throw_os_error(with_progress(
        progress, [&](const PageLock::Progress& report) { return store->lock_pages(on, report); }));
  }
  int64_t locked_bytes() const {
    const PageLock* lock = get()->page_lock();
    return lock != nullptr ? lock->bytes() : 0;
  }

  py::array scale(int layer, int expert, int which) const {
    std::shared_ptr<HostStore> store = at(layer, expert, which);
    const Matrix matrix = static_cast<Matrix>(which);
    const FormatInfo& info = format_info(store->layer(layer).format);
    if (!info.scaled()) throw py::value_error("weights of this layer's format have no scales");
    auto [rows, cols] = store->scale_shape(layer, matrix);
    const py::dtype dtype = dtype_of(info.scale_type);
    const int64_t size = scale_bytes(info.scale_type);
    if (store->scale_rows(layer, matrix, 0).second == rows) {
      py::capsule owner(new std::shared_ptr<HostStore>(store),
                        [](void* p) { delete static_cast<std::shared_ptr<HostStore>*>(p); });
      return read_only(py::array(dtype, {rows, cols}, {cols * size, size},
                                 store->scale(layer, expert, matrix, 0), owner));
    }
    py::array copy(dtype, {rows, cols});
    for (int node = 0; node < store->num_nodes(); ++node) {
      auto [begin, end] = store->scale_rows(layer, matrix, node);
      if (begin == end) continue;
      std::memcpy(static_cast<uint8_t*>(copy.mutable_data()) + begin * cols * size,
                  store->scale(layer, expert, matrix, node),
                  static_cast<size_t>((end - begin) * cols * size));
    }
    return read_only(std::move(copy));
  }

 private:
  std::shared_ptr<HostStore> store_;
  int id_ = -1;
};

}  // namespace

WeightFormat format_from_name(const std::string& name) {
  std::string known;
  for (int i = 0; i < kNumFormats; ++i) {
    if (name == kFormatInfo[i].name) return static_cast<WeightFormat>(i);
    known += std::string(i == 0                 ? ""
                         : i + 1 == kNumFormats ? " or "
                                                : ", ") +
             "\"" + kFormatInfo[i].name + "\"";
  }
  throw py::value_error("weight format is \"" + name + "\"; wanted " + known);
}

std::shared_ptr<HostStore> store_of(py::handle store) { return store.cast<StoreBinding&>().get(); }

void bind_host_store(py::module_& module) {
  py::class_<StoreBinding>(module, "HostStore")
      .def(py::init<py::handle, const std::vector<LayerTuple>&, const std::string&,
                    const std::string&, const std::string&>(),
           py::arg("runtime"), py::arg("layers"), py::arg("backing") = "arena",
           py::arg("shared_name") = "", py::arg("fingerprint") = py::bytes())
      .def_property_readonly("id", &StoreBinding::id)
      .def_property_readonly("total_bytes",
                             [](const StoreBinding& s) { return s.get()->total_bytes(); })
      .def_property_readonly("num_nodes",
                             [](const StoreBinding& s) { return s.get()->num_nodes(); })
      .def_property_readonly("num_layers",
                             [](const StoreBinding& s) { return s.get()->num_layers(); })
      .def("bytes_per_node", [](const StoreBinding& s) { return s.get()->bytes_per_node(); })
      .def("read_matrix", &StoreBinding::read_matrix, py::arg("layer"), py::arg("expert"),
           py::arg("which"), py::arg("fd"), py::arg("offset"))
      .def("map_file", &StoreBinding::map_file, py::arg("path"))
      .def("set_mapped", &StoreBinding::set_mapped, py::arg("layer"), py::arg("expert"),
           py::arg("which"), py::arg("file_idx"), py::arg("offset"))
      .def("set_scale", &StoreBinding::set_scale, py::arg("layer"), py::arg("expert"),
           py::arg("which"), py::arg("scale"))
      .def("matrix", &StoreBinding::matrix, py::arg("layer"), py::arg("expert"), py::arg("which"))
      .def("segments", &StoreBinding::segments, py::arg("layer"), py::arg("expert"),
           py::arg("which"))
      .def("mark_loaded", &StoreBinding::mark_loaded, py::arg("layer"), py::arg("expert"),
           py::arg("which"))
      .def("is_loaded", &StoreBinding::is_loaded, py::arg("layer"), py::arg("expert"),
           py::arg("which"))
      .def("seal", &StoreBinding::seal)
      .def("scale", &StoreBinding::scale, py::arg("layer"), py::arg("expert"), py::arg("which"))
      .def("lock_pages", &StoreBinding::lock_pages, py::arg("driver"),
           py::arg("progress") = py::none())
      .def_property_readonly("locked_bytes", &StoreBinding::locked_bytes)
      .def("close", &StoreBinding::close);
}

}  // namespace jaxmoe

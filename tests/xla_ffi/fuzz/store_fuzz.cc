// The store's border: any indices, shapes and file offsets, and a shared segment whose bytes some
// other process has changed. Refused, or done inside the store's memory.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#include "fuzz_input.h"
#include "runtime/host_store.h"

using namespace jaxmoe;

namespace {

Topology one_node() {
  Topology topology;
  jaxmoe_fuzz::require(fake_topology({{allowed_cpus()[0]}}, allowed_cpus(), &topology).ok(),
                       "there is a node");
  return topology;
}

void change_segment(const std::string& name, jaxmoe_fuzz::Input& input) {
  int fd = shm_open(name.c_str(), O_RDWR, 0);
  if (fd < 0) return;
  const int count = static_cast<int>(input.between(1, 8));
  for (int i = 0; i < count; ++i) {
    const uint8_t byte = input.byte();
    (void)!pwrite(fd, &byte, 1, static_cast<off_t>(input.word() & 0x3fff));
  }
  close(fd);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Topology topology = one_node();
  static const std::string name = "/jaxmoe-fuzz-" + std::to_string(getpid());
  static const int file = [] {
    int fd = memfd_create("weights", 0);
    jaxmoe_fuzz::require(fd >= 0 && ftruncate(fd, 2000) == 0, "there is a file");
    return fd;
  }();
  jaxmoe_fuzz::Input input(data, size);
  std::vector<ExpertLayerSpec> layers;
  const int count = static_cast<int>(input.between(1, 2));
  for (int i = 0; i < count; ++i) {
    layers.push_back({input.between(1, 3), input.between(1, 20), input.between(1, 20),
                      input.byte() & 1 ? WeightFormat::kFp8Block : WeightFormat::kBf16});
  }
  SharedName shared{name, {}};
  const bool is_shared = input.byte() & 1;
  for (int attempt = 0; attempt < (is_shared ? 2 : 1); ++attempt) {
    std::shared_ptr<HostStore> store;
    if (!HostStore::create(topology, layers, Backing::kArena, &store, is_shared ? &shared : nullptr)
             .ok()) {
      break;
    }
    const int calls = static_cast<int>(input.between(0, 12));
    for (int i = 0; i < calls; ++i) {
      const int layer = input.index(count), which = input.index(3);
      const int64_t expert = input.index(3);
      if (!store->check_index(layer, expert, which).ok()) continue;
      const auto matrix = static_cast<Matrix>(which);
      const int e = static_cast<int>(expert);
      switch (input.byte() % 4) {
        case 0:
          (void)store->read_matrix(layer, e, matrix, file, input.index(2000));
          break;
        case 1: {
          std::vector<float> scale(16, 1.0f);
          const auto type = static_cast<ScaleType>(input.index(4));
          (void)store->set_scale(layer, e, matrix, type, scale.data(), input.between(0, 4),
                                 input.between(0, 4));
          break;
        }
        case 2:
          (void)store->check_loaded(layer, e);
          break;
        default:
          if (store->is_loaded(layer, e, matrix)) {
            const WeightView view = store->view(layer, e, matrix, 0);
            volatile uint8_t last = view.data[(view.n - 1) * view.row_stride_bytes];
            (void)last;
          }
      }
    }
    if (input.byte() & 1) (void)store->seal();
    store.reset();
    if (is_shared) change_segment(name, input);
  }
  if (is_shared) (void)SharedSegment::remove(name);
  return 0;
}

// HostStore: filled by reads and by mapping, split over nodes, and its errors.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "native_testing.h"
#include "runtime/host_store.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

constexpr int kGateUpDown[] = {0, 1, 2};

Topology nodes(int count) {
  Topology topology;
  std::vector<std::vector<int>> cpus(static_cast<size_t>(count), {allowed_cpus()[0]});
  JAXMOE_CHECK(fake_topology(cpus, allowed_cpus(), &topology).ok());
  return topology;
}

std::shared_ptr<HostStore> make_store(int num_nodes, std::vector<ExpertLayerSpec> layers,
                                      Backing backing = Backing::kArena) {
  std::shared_ptr<HostStore> store;
  Status status = HostStore::create(nodes(num_nodes), std::move(layers), backing, &store);
  JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
  return store;
}

std::string random_bytes(size_t count, uint64_t seed) {
  Random random(seed);
  std::string bytes(count, 0);
  for (char& b : bytes) b = static_cast<char>(random.bits());
  return bytes;
}

const std::vector<ExpertLayerSpec> kLayers = {{3, 20, 36, WeightFormat::kFp8Block},
                                              {2, 130, 16, WeightFormat::kBf16}};
// A format with scales that lie with the rows, and others.
const std::vector<ExpertLayerSpec> kGroupLayers = {{2, 64, 96, WeightFormat::kInt4G32},
                                                   {3, 20, 36, WeightFormat::kFp8Channel},
                                                   {2, 160, 32, WeightFormat::kMxfp4},
                                                   {1, 128, 128, WeightFormat::kInt4G128},
                                                   {1, 32, 64, WeightFormat::kMxfp8}};

}  // namespace

JAXMOE_TEST(row_splits) {
  for (int64_t n : {1, 7, 8, 9, 20, 2048, 7168, 1001}) {
    for (int count : {1, 2, 3, 8}) {
      int64_t end_before = 0;
      for (int node = 0; node < count; ++node) {
        auto [begin, end] = node_rows(n, node, count);
        JAXMOE_CHECK(begin == end_before && end >= begin);
        JAXMOE_CHECK(end == n || end % HostStore::kRowSplit == 0);
        end_before = end;
      }
      JAXMOE_CHECK(end_before == n);
    }
  }
  JAXMOE_CHECK(node_rows(2048, 0, 2).second == 1024);
}

JAXMOE_TEST(reads_land_where_views_look) {
  TempDir dir;
  std::string content = random_bytes(100000, 1);
  std::string path = dir.write("weights", content);
  int fd = open(path.c_str(), O_RDONLY);
  for (int num_nodes : {1, 2, 3}) {
    auto store = make_store(num_nodes, kLayers);
    JAXMOE_CHECK(store->total_bytes() == 3 * 3 * 20 * 36 + 2 * 3 * 130 * 16 * 2);
    int64_t sum = 0;
    for (int64_t bytes : store->bytes_per_node()) sum += bytes;
    JAXMOE_CHECK(sum == store->total_bytes());
    // All matrices at once, each from its own place, from several threads.
    auto offset_of = [](int layer, int expert, int which) {
      return 13 + 5000 * (layer * 9 + expert * 3 + which);
    };
    std::vector<std::thread> threads;
    for (int which : kGateUpDown) {
      threads.emplace_back([&, which] {
        for (int layer = 0; layer < 2; ++layer) {
          for (int expert = 0; expert < store->layer(layer).num_experts; ++expert) {
            Status status = store->read_matrix(layer, expert, static_cast<Matrix>(which), fd,
                                               offset_of(layer, expert, which));
            JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (int layer = 0; layer < 2; ++layer) {
      for (int expert = 0; expert < store->layer(layer).num_experts; ++expert) {
        for (int m : kGateUpDown) {
          const Matrix which = static_cast<Matrix>(m);
          for (int node = 0; node < num_nodes; ++node) {
            WeightView view = store->view(layer, expert, which, node);
            JAXMOE_CHECK(view.n == store->rows(layer, which) &&
                         view.k == store->cols(layer, which));
            auto [begin, end] = node_rows(view.n, node, num_nodes);
            for (int64_t row = begin; row < end; ++row) {
              int64_t at = offset_of(layer, expert, m) + row * view.row_stride_bytes;
              JAXMOE_CHECK(std::memcmp(view.data + row * view.row_stride_bytes, content.data() + at,
                                       static_cast<size_t>(view.row_stride_bytes)) == 0);
            }
          }
        }
      }
    }
  }
  close(fd);
}

JAXMOE_TEST(truncated_files_and_bad_descriptors_are_named) {
  TempDir dir;
  std::string path = dir.write("short", random_bytes(719, 2));
  int fd = open(path.c_str(), O_RDONLY);
  auto store = make_store(1, kLayers);
  Status status = store->read_matrix(0, 2, Matrix::kUp, fd, 0);  // needs 720
  JAXMOE_CHECK(contains(status.message(), "ends at byte 719") &&
                   contains(status.message(), "layer 0 expert 2 up") &&
                   contains(status.message(), "720 bytes at offset 0"),
               "%s", status.message().c_str());
  JAXMOE_CHECK(contains(store->check_loaded(0, 2).message(), "was not loaded yet"));
  status = store->read_matrix(0, 2, Matrix::kUp, fd, 5000);
  JAXMOE_CHECK(contains(status.message(), "ends at byte 5000"), "%s", status.message().c_str());
  JAXMOE_CHECK(!store->read_matrix(0, 0, Matrix::kUp, fd, -1).ok());
  close(fd);
  JAXMOE_CHECK(contains(store->read_matrix(0, 0, Matrix::kUp, fd, 0).message(), "Bad file"));
}

JAXMOE_TEST(loading_is_tracked) {
  TempDir dir;
  std::string path = dir.write("weights", random_bytes(5000, 3));
  int fd = open(path.c_str(), O_RDONLY);
  auto store = make_store(2, kLayers);
  for (int m : kGateUpDown) {
    JAXMOE_CHECK(!store->check_loaded(0, 1).ok());
    JAXMOE_CHECK(store->read_matrix(0, 1, static_cast<Matrix>(m), fd, 0).ok());
  }
  JAXMOE_CHECK(contains(store->check_loaded(0, 1).message(), "gate has no scale yet"));
  const float scale[] = {0.5f};
  for (int m : kGateUpDown) {
    JAXMOE_CHECK(store->set_scale(0, 1, static_cast<Matrix>(m), ScaleType::kF32, scale, 1, 1).ok());
  }
  JAXMOE_CHECK(store->check_loaded(0, 1).ok());
  JAXMOE_CHECK(!store->check_loaded(0, 0).ok());
  Status status = store->set_scale(0, 1, Matrix::kUp, ScaleType::kF32, scale, 1, 2);
  JAXMOE_CHECK(contains(status.message(), "[1, 2]; wanted [1, 1] for a matrix of [20, 36]"), "%s",
               status.message().c_str());
  status = store->set_scale(0, 1, Matrix::kUp, ScaleType::kBf16, scale, 1, 1);
  JAXMOE_CHECK(contains(status.message(), "is bfloat16; wanted float32 for format fp8_block"), "%s",
               status.message().c_str());
  status = store->set_scale(1, 0, Matrix::kUp, ScaleType::kF32, scale, 1, 1);
  JAXMOE_CHECK(contains(status.message(), "has no scales: its format is bf16"), "%s",
               status.message().c_str());
  for (int m : kGateUpDown) JAXMOE_CHECK(store->mark_loaded(1, 0, static_cast<Matrix>(m)).ok());
  JAXMOE_CHECK(store->check_loaded(1, 0).ok());
  close(fd);
}

JAXMOE_TEST(mapped_files) {
  TempDir dir;
  std::string content = random_bytes(9000, 4);
  std::string path = dir.write("weights", content);
  auto store = make_store(2, kLayers, Backing::kMmap);
  int file = -1;
  JAXMOE_CHECK(store->map_file(path, &file).ok() && file == 0);
  JAXMOE_CHECK(store->set_mapped(0, 1, Matrix::kDown, file, 17).ok());
  for (int node = 0; node < 2; ++node) {
    WeightView view = store->view(0, 1, Matrix::kDown, node);
    JAXMOE_CHECK(std::memcmp(view.data, content.data() + 17, 720) == 0);
  }
  JAXMOE_CHECK(store->set_mapped(0, 1, Matrix::kDown, file, 9000 - 720).ok());
  Status status = store->set_mapped(0, 1, Matrix::kDown, file, 9000 - 719);
  JAXMOE_CHECK(contains(status.message(), "bytes 8281 to 9001") && contains(status.message(), path),
               "%s", status.message().c_str());
  JAXMOE_CHECK(!store->set_mapped(0, 1, Matrix::kDown, file, -8).ok());
  JAXMOE_CHECK(!store->set_mapped(0, 1, Matrix::kDown, 1, 0).ok());
  JAXMOE_CHECK(contains(store->set_mapped(1, 0, Matrix::kUp, file, 3).message(), "multiple"));
  JAXMOE_CHECK(!store->map_file(path + "_missing", &file).ok());
  JAXMOE_CHECK(!store->map_file(dir.write("empty", ""), &file).ok());
  JAXMOE_CHECK(!store->read_matrix(0, 0, Matrix::kUp, 0, 0).ok());
  JAXMOE_CHECK(!store->mark_loaded(0, 0, Matrix::kUp).ok());
  auto arena = make_store(1, kLayers);
  JAXMOE_CHECK(!arena->map_file(path, &file).ok());
}

JAXMOE_TEST(indices_and_sizes_are_checked) {
  auto store = make_store(1, kLayers);
  JAXMOE_CHECK(
      contains(store->check_index(2, 0, 0).message(), "MoE layer 2 of a store that has 2"));
  JAXMOE_CHECK(
      contains(store->check_index(1, 2, 0).message(), "expert 2 of MoE layer 1, which has 2"));
  JAXMOE_CHECK(!store->check_index(0, 0, 3).ok() && !store->check_index(0, -1, 0).ok());
  std::shared_ptr<HostStore> none;
  Status status =
      HostStore::create(nodes(1), {{4, 0, 8, WeightFormat::kBf16}}, Backing::kArena, &none);
  JAXMOE_CHECK(contains(status.message(), "layer 0") &&
               contains(status.message(), "intermediate 0"));
}

namespace {

// A name nobody else uses, removed at the end.
struct TempShared {
  SharedName name;
  explicit TempShared(const char* what) {
    name.name = "/jaxmoe-test-" + std::to_string(getpid()) + "-" + what;
    name.fingerprint[0] = 7;
    JAXMOE_CHECK(SharedSegment::remove(name.name).ok());
  }
  ~TempShared() { (void)SharedSegment::remove(name.name); }
  std::string path() const { return "/dev/shm" + name.name; }
};

Status open_shared(const SharedName& name, int num_nodes, std::vector<ExpertLayerSpec> layers,
                   std::shared_ptr<HostStore>* store) {
  return HostStore::create(nodes(num_nodes), std::move(layers), Backing::kArena, store, &name);
}

// Scales that say whose they are, none of them 255.
std::vector<uint8_t> scales_of(const HostStore& store, int layer, int64_t at, Matrix which) {
  Random random(static_cast<uint64_t>(at));
  std::vector<uint8_t> scale(static_cast<size_t>(store.scale_matrix_bytes(layer, which)));
  for (uint8_t& byte : scale) byte = static_cast<uint8_t>(random.below(255));
  return scale;
}

// Every matrix from its own place in the file, every scale from its index.
void load_all(HostStore* store, int fd) {
  int64_t at = 0;
  for (int l = 0; l < store->num_layers(); ++l) {
    for (int e = 0; e < store->layer(l).num_experts; ++e) {
      for (int m : kGateUpDown) {
        Matrix which = static_cast<Matrix>(m);
        if (!store->is_loaded(l, e, which)) {
          JAXMOE_CHECK(store->read_matrix(l, e, which, fd, at).ok());
          const FormatInfo& info = format_info(store->layer(l).format);
          if (info.scaled()) {
            auto [rows, cols] = store->scale_shape(l, which);
            Status status = store->set_scale(l, e, which, info.scale_type,
                                             scales_of(*store, l, at, which).data(), rows, cols);
            JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
          }
        }
        at += store->matrix_bytes(l, which);
      }
    }
  }
}

// Rows of scales as the kernels find them: through the views.
void check_scales(const HostStore& store, int l, int e, Matrix which, int64_t at) {
  const FormatInfo& info = format_info(store.layer(l).format);
  const std::vector<uint8_t> scale = scales_of(store, l, at, which);
  for (int node = 0; node < store.num_nodes(); ++node) {
    const WeightView view = store.view(l, e, which, node);
    JAXMOE_CHECK((view.scale != nullptr) == info.scaled());
    if (!info.scaled()) continue;
    const int64_t stride = view.scale_stride * scale_bytes(info.scale_type);
    auto [begin, end] = node_rows(view.n, node, store.num_nodes());
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = row / info.group_rows * stride;
      JAXMOE_CHECK(std::memcmp(view.scale + offset, scale.data() + offset,
                               static_cast<size_t>(stride)) == 0);
    }
  }
}

void check_all(const HostStore& store, const std::string& content) {
  int64_t at = 0;
  for (int l = 0; l < store.num_layers(); ++l) {
    for (int e = 0; e < store.layer(l).num_experts; ++e) {
      for (int m : kGateUpDown) {
        Matrix which = static_cast<Matrix>(m);
        for (int node = 0; node < store.num_nodes(); ++node) {
          auto [begin, end] = node_rows(store.rows(l, which), node, store.num_nodes());
          JAXMOE_CHECK(std::memcmp(store.segment(l, e, which, node),
                                   content.data() + at + begin * store.row_bytes(l, which),
                                   (end - begin) * store.row_bytes(l, which)) == 0);
        }
        check_scales(store, l, e, which, at);
        at += store.matrix_bytes(l, which);
      }
    }
  }
}

}  // namespace

JAXMOE_TEST(a_shared_store_is_found_again_whole_or_in_part) {
  TempDir dir;
  std::string content = random_bytes(80000, 5);
  int fd = open(dir.write("weights", content).c_str(), O_RDONLY);
  for (int num_nodes : {1, 2}) {
    // Scales with the rows of their node are shared like the weights.
    {
      TempShared shared("groups");
      std::shared_ptr<HostStore> store, second;
      JAXMOE_CHECK(open_shared(shared.name, num_nodes, kGroupLayers, &store).ok());
      load_all(store.get(), fd);
      JAXMOE_CHECK(store->seal().ok());
      JAXMOE_CHECK(open_shared(shared.name, num_nodes, kGroupLayers, &second).ok());
      store.reset();
      check_all(*second, content);
    }
    TempShared shared("found");
    std::shared_ptr<HostStore> store;
    Status status = open_shared(shared.name, num_nodes, kLayers, &store);
    JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
    JAXMOE_CHECK(store->is_shared() && store->is_writable());
    struct stat info;
    JAXMOE_CHECK(stat(shared.path().c_str(), &info) == 0 && (info.st_mode & 0777) == 0600);
    // As if the process ended after one matrix: its data without the scale counts for nothing.
    JAXMOE_CHECK(store->read_matrix(1, 1, Matrix::kUp, fd, 0).ok());
    JAXMOE_CHECK(store->read_matrix(0, 0, Matrix::kUp, fd, 0).ok());
    JAXMOE_CHECK(!store->seal().ok());
    store.reset();
    JAXMOE_CHECK(open_shared(shared.name, num_nodes, kLayers, &store).ok());
    JAXMOE_CHECK(store->is_loaded(1, 1, Matrix::kUp) && !store->is_loaded(1, 1, Matrix::kGate));
    JAXMOE_CHECK(!store->is_loaded(0, 0, Matrix::kUp));
    store.reset();
    JAXMOE_CHECK(SharedSegment::remove(shared.name.name).ok());

    JAXMOE_CHECK(open_shared(shared.name, num_nodes, kLayers, &store).ok());
    load_all(store.get(), fd);
    status = store->seal();
    JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
    JAXMOE_CHECK(!store->is_writable());
    check_all(*store, content);
    // Attached beside the first, and after it.
    std::shared_ptr<HostStore> second;
    JAXMOE_CHECK(open_shared(shared.name, num_nodes, kLayers, &second).ok());
    store.reset();
    JAXMOE_CHECK(!second->is_writable());
    check_all(*second, content);
    JAXMOE_CHECK(!second->read_matrix(0, 0, Matrix::kUp, fd, 0).ok());
    JAXMOE_CHECK(!second->mark_loaded(0, 0, Matrix::kUp).ok());
    const float one[] = {1.0f};
    JAXMOE_CHECK(!second->set_scale(0, 0, Matrix::kUp, ScaleType::kF32, one, 1, 1).ok());
  }
  close(fd);
}

JAXMOE_TEST(scales_of_groups_lie_with_their_rows) {
  TempDir dir;
  const std::string content = random_bytes(80000, 6);
  const std::string path = dir.write("weights", content);
  int fd = open(path.c_str(), O_RDONLY);
  for (int num_nodes : {1, 2, 3}) {
    auto store = make_store(num_nodes, kGroupLayers);
    load_all(store.get(), fd);
    check_all(*store, content);
    // Weights and scales of groups are counted, each on its node; the FP32 ones of rows are not.
    const int64_t int4 = 2 * 3 * 64 * 96 / 2, int4_scales = 2 * 3 * 64 * 96 / 32 * 2;
    const int64_t fp8 = 3 * 3 * 20 * 36, mxfp4 = 2 * 3 * 160 * 32 / 2 + 2 * 3 * 160;
    const int64_t int4_128 = 3 * 128 * 128 / 2 + 3 * 128 * 2, mxfp8 = 3 * 32 * 64 + 3 * 32 * 2;
    JAXMOE_CHECK(store->total_bytes() == int4 + int4_scales + fp8 + mxfp4 + int4_128 + mxfp8);
    int64_t sum = 0;
    for (int64_t bytes : store->bytes_per_node()) {
      sum += bytes;
      JAXMOE_CHECK(bytes >= store->total_bytes() / num_nodes * 3 / 4);
    }
    JAXMOE_CHECK(sum == store->total_bytes());
    auto [begin, end] = store->scale_rows(0, Matrix::kUp, num_nodes - 1);
    JAXMOE_CHECK(std::pair(begin, end) == node_rows(64, num_nodes - 1, num_nodes));
    JAXMOE_CHECK(store->scale_rows(1, Matrix::kUp, 0).second == 20);

    // Mapped files: the weights lie in the file, the scales in the store.
    auto mapped = make_store(num_nodes, kGroupLayers, Backing::kMmap);
    int file = -1;
    JAXMOE_CHECK(mapped->map_file(path, &file).ok());
    int64_t at = 0;
    for (int l = 0; l < mapped->num_layers(); ++l) {
      const FormatInfo& info = format_info(mapped->layer(l).format);
      for (int e = 0; e < mapped->layer(l).num_experts; ++e) {
        for (int m : kGateUpDown) {
          const Matrix which = static_cast<Matrix>(m);
          JAXMOE_CHECK(mapped->set_mapped(l, e, which, file, at).ok());
          auto [rows, cols] = mapped->scale_shape(l, which);
          JAXMOE_CHECK(mapped
                           ->set_scale(l, e, which, info.scale_type,
                                       scales_of(*mapped, l, at, which).data(), rows, cols)
                           .ok());
          check_scales(*mapped, l, e, which, at);
          JAXMOE_CHECK(std::memcmp(mapped->view(l, e, which, 0).data, content.data() + at,
                                   static_cast<size_t>(mapped->matrix_bytes(l, which))) == 0);
          at += mapped->matrix_bytes(l, which);
        }
        JAXMOE_CHECK(mapped->check_loaded(l, e).ok());
      }
    }
    JAXMOE_CHECK(mapped->total_bytes() == store->total_bytes());
  }
  close(fd);
}

JAXMOE_TEST(scales_and_columns_that_no_format_has_are_errors) {
  auto store = make_store(2, kGroupLayers);
  std::vector<uint8_t> powers(160, 127);
  powers[13] = 255;
  Status status = store->set_scale(2, 1, Matrix::kUp, ScaleType::kE8m0, powers.data(), 160, 1);
  JAXMOE_CHECK(contains(status.message(), "layer 2 expert 1 up is 255, NaN, at [13, 0]"), "%s",
               status.message().c_str());
  JAXMOE_CHECK(!store->is_loaded(2, 1, Matrix::kUp));
  status = store->set_scale(0, 0, Matrix::kUp, ScaleType::kE8m0, powers.data(), 160, 1);
  JAXMOE_CHECK(contains(status.message(), "wanted bfloat16 for format int4_g32"), "%s",
               status.message().c_str());
  auto other =
      make_store(2, {{1, 32, 32, WeightFormat::kUint4G32}, {1, 32, 32, WeightFormat::kNvfp4}});
  std::vector<uint32_t> words(32, 0x3F800010);
  JAXMOE_CHECK(other->set_scale(0, 0, Matrix::kUp, ScaleType::kF32Zero, words.data(), 32, 1).ok());
  words[9] += 1;
  status = other->set_scale(0, 0, Matrix::kUp, ScaleType::kF32Zero, words.data(), 32, 1);
  JAXMOE_CHECK(contains(status.message(), "up is 17 at [9, 0]; wanted 0 to 16"), "%s",
               status.message().c_str());
  std::vector<uint8_t> rows(32 * 6, 0xFE);
  rows[5] = 0xFF;  // of a factor
  JAXMOE_CHECK(other->set_scale(1, 0, Matrix::kUp, ScaleType::kE4m3, rows.data(), 32, 6).ok());
  rows[13] = 0xFF;
  status = other->set_scale(1, 0, Matrix::kUp, ScaleType::kE4m3, rows.data(), 32, 6);
  JAXMOE_CHECK(contains(status.message(), "up is NaN at [2, 1]"), "%s", status.message().c_str());
  std::shared_ptr<HostStore> none;
  for (WeightFormat format : {WeightFormat::kInt4G32, WeightFormat::kInt4G128, WeightFormat::kMxfp4,
                              WeightFormat::kMxfp8, WeightFormat::kUint4G32}) {
    status = HostStore::create(nodes(1), {{4, 128, 144, format}}, Backing::kArena, &none);
    JAXMOE_CHECK(contains(status.message(), "has rows of 144 weights: wanted a multiple of"), "%s",
                 status.message().c_str());
  }
}

JAXMOE_TEST(many_attach_to_a_full_store_at_once) {
  TempDir dir;
  int fd = open(dir.write("weights", random_bytes(40000, 5)).c_str(), O_RDONLY);
  TempShared shared("many");
  std::shared_ptr<HostStore> first;
  JAXMOE_CHECK(open_shared(shared.name, 1, kLayers, &first).ok());
  load_all(first.get(), fd);
  JAXMOE_CHECK(first->seal().ok());
  // Locks belong to open files, so threads meet them as processes do.
  std::vector<std::thread> threads;
  std::atomic<int> failed{0};
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 30; ++i) {
        std::shared_ptr<HostStore> store;
        if (!open_shared(shared.name, 1, kLayers, &store).ok() || store->is_writable()) ++failed;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  JAXMOE_CHECK(failed == 0, "%d could not attach", failed.load());
  close(fd);
}

JAXMOE_TEST(a_shared_store_of_other_weights_is_refused) {
  TempShared shared("other");
  std::shared_ptr<HostStore> store, other;
  JAXMOE_CHECK(open_shared(shared.name, 1, kLayers, &store).ok());
  // While it is being filled, nobody else may have it.
  Status status = open_shared(shared.name, 1, kLayers, &other);
  JAXMOE_CHECK(contains(status.message(), "another process is filling it"), "%s",
               status.message().c_str());
  store.reset();
  SharedName wrong = shared.name;
  wrong.fingerprint[31] = 1;
  JAXMOE_CHECK(contains(open_shared(wrong, 1, kLayers, &other).message(), "other weights"));
  std::vector<ExpertLayerSpec> swapped = kLayers;
  std::swap(swapped[0].intermediate, swapped[0].hidden);
  JAXMOE_CHECK(contains(open_shared(shared.name, 1, swapped, &other).message(), "other weights"));
  std::vector<ExpertLayerSpec> larger = {{64, 512, 1024, WeightFormat::kBf16}};
  JAXMOE_CHECK(contains(open_shared(shared.name, 1, larger, &other).message(), "bytes, wanted"));
  JAXMOE_CHECK(chmod(shared.path().c_str(), 0644) == 0);
  JAXMOE_CHECK(contains(open_shared(shared.name, 1, kLayers, &other).message(), "open to others"));
  for (const char* name : {"", "/", "none", "/a/b"}) {
    JAXMOE_CHECK(contains(open_shared({name, {}}, 1, kLayers, &other).message(), "wanted a slash"));
  }
  Status mapped = HostStore::create(nodes(1), kLayers, Backing::kMmap, &other, &shared.name);
  JAXMOE_CHECK(contains(mapped.message(), "nothing to share"));
}

// Under ThreadSanitizer the address space itself is too small for what no memory holds.
#ifndef __SANITIZE_THREAD__
JAXMOE_TEST(a_shared_store_without_room_is_an_error_not_a_signal) {
  TempShared shared("room");
  std::shared_ptr<HostStore> store;
  // Matrices of 4 TiB fit the address space and no memory.
  std::vector<ExpertLayerSpec> huge = {{1, 1 << 20, 1 << 20, WeightFormat::kF32}};
  JAXMOE_CHECK(open_shared(shared.name, 1, huge, &store).ok());
  TempDir dir;
  int fd = open(dir.write("weights", random_bytes(10, 1)).c_str(), O_RDONLY);
  Status status = store->read_matrix(0, 0, Matrix::kGate, fd, 0);
  JAXMOE_CHECK(contains(status.message(), "no room for"), "%s", status.message().c_str());
  close(fd);
}
#endif

JAXMOE_TEST(arenas_are_aligned_and_lazy) {
  std::unique_ptr<Arena> arena;
  // Far more than is ever touched.
  JAXMOE_CHECK(Arena::create(size_t{64} << 20, -1, &arena).ok());
  JAXMOE_CHECK(reinterpret_cast<uintptr_t>(arena->data()) % (2 << 20) == 0);
  arena->data()[arena->bytes() - 1] = 1;
  JAXMOE_CHECK(arena->data()[0] == 0);
}

JAXMOE_TEST_MAIN

// HostStore: filled by reads and by mapping, split over nodes, and its errors.
#include <fcntl.h>
#include <unistd.h>

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
    JAXMOE_CHECK(store->set_scale(0, 1, static_cast<Matrix>(m), scale, 1, 1).ok());
  }
  JAXMOE_CHECK(store->check_loaded(0, 1).ok());
  JAXMOE_CHECK(!store->check_loaded(0, 0).ok());
  Status status = store->set_scale(0, 1, Matrix::kUp, scale, 1, 2);
  JAXMOE_CHECK(contains(status.message(), "[1, 2]; wanted [1, 1] for a matrix of [20, 36]"), "%s",
               status.message().c_str());
  JAXMOE_CHECK(!store->set_scale(1, 0, Matrix::kUp, scale, 1, 1).ok());  // BF16 has none
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

JAXMOE_TEST(arenas_are_aligned_and_lazy) {
  std::unique_ptr<Arena> arena;
  // Far more than is ever touched.
  JAXMOE_CHECK(Arena::create(size_t{64} << 20, -1, &arena).ok());
  JAXMOE_CHECK(reinterpret_cast<uintptr_t>(arena->data()) % (2 << 20) == 0);
  arena->data()[arena->bytes() - 1] = 1;
  JAXMOE_CHECK(arena->data()[0] == 0);
}

JAXMOE_TEST_MAIN

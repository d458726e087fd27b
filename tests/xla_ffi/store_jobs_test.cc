// Jobs out of the host store: what lies in a slot afterwards, how many copies that takes, and that
// page-locked parts are never crossed.
#include "prefill/store_jobs.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstring>

#include "kernels/formats.h"
#include "native_testing.h"
#include "runtime/host_driver.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

void ok(const Status& status) { JAXMOE_CHECK(status.ok(), "%s", status.message().c_str()); }

void fails_with(const Status& status, const char* part) {
  JAXMOE_CHECK(!status.ok() && contains(status.message(), part), "'%s' should contain '%s'",
               status.message().c_str(), part);
}

// Odd sizes; FP8 rows that are no multiple of a cache line; a matrix with fewer row groups than
// nodes.
const std::vector<ExpertLayerSpec> kLayers = {
    {5, 20, 36, WeightFormat::kFp8Block},   {3, 130, 16, WeightFormat::kBf16},
    {4, 6, 300, WeightFormat::kFp8Block},   {3, 64, 96, WeightFormat::kInt4G32},
    {3, 40, 12, WeightFormat::kFp8Channel}, {2, 32, 64, WeightFormat::kMxfp8}};

Topology nodes(int count) {
  Topology topology;
  std::vector<std::vector<int>> cpus(static_cast<size_t>(count), {allowed_cpus()[0]});
  ok(fake_topology(cpus, allowed_cpus(), &topology));
  return topology;
}

// The matrix's byte at `i`, the scale at `i`.
uint8_t weight_at(int layer, int expert, int which, int64_t i) {
  return static_cast<uint8_t>((i * 7 + layer * 50 + expert * 11 + which * 3 + (i >> 8)) % 251);
}
uint8_t scale_byte_at(int layer, int expert, int which, int64_t i) {
  return static_cast<uint8_t>((i * 5 + layer * 70 + expert * 13 + which * 29 + (i >> 7)) % 253);
}

struct Filled {
  Filled(int num_nodes, Backing backing) {
    ok(HostStore::create(nodes(num_nodes), kLayers, backing, &store));
    std::string content;
    std::vector<std::array<int64_t, 4>> places;
    for (int l = 0; l < store->num_layers(); ++l) {
      for (int e = 0; e < store->layer(l).num_experts; ++e) {
        for (int m = 0; m < kNumMatrices; ++m) {
          places.push_back({l, e, m, static_cast<int64_t>(content.size())});
          for (int64_t i = 0; i < store->matrix_bytes(l, static_cast<Matrix>(m)); ++i) {
            content.push_back(static_cast<char>(weight_at(l, e, m, i)));
          }
        }
      }
    }
    const std::string path = dir.write("weights", content);
    const int fd = open(path.c_str(), O_RDONLY);
    int file_idx = 0;
    if (backing == Backing::kMmap) ok(store->map_file(path, &file_idx));
    for (auto [l, e, m, at] : places) {
      const int layer = static_cast<int>(l), expert = static_cast<int>(e);
      const auto which = static_cast<Matrix>(m);
      ok(backing == Backing::kMmap ? store->set_mapped(layer, expert, which, file_idx, at)
                                   : store->read_matrix(layer, expert, which, fd, at));
      const ScaleType type = format_info(store->layer(layer).format).scale_type;
      if (type == ScaleType::kNone) continue;
      std::vector<uint8_t> scale(scale_bytes(layer, static_cast<int>(m)));
      for (size_t i = 0; i < scale.size(); ++i) {
        scale[i] = scale_byte_at(layer, expert, static_cast<int>(m), static_cast<int64_t>(i));
      }
      auto [rows, cols] = store->scale_shape(layer, which);
      ok(store->set_scale(layer, expert, which, type, scale.data(), rows, cols));
    }
    close(fd);
  }

  size_t weight_bytes(int layer, int which) const {
    return static_cast<size_t>(store->matrix_bytes(layer, static_cast<Matrix>(which)));
  }
  size_t scale_bytes(int layer, int which) const {
    return static_cast<size_t>(store->scale_matrix_bytes(layer, static_cast<Matrix>(which)));
  }

  TempDir dir;
  std::shared_ptr<HostStore> store;
};

// A ring whose slots hold any layer whole.
struct Slots {
  Slots(const Filled& filled, std::shared_ptr<HostDriver> driver) : memory(2) {
    std::vector<std::vector<SlotBuffer>> slots;
    for (auto& slot : memory) {
      slots.emplace_back();
      for (int b = 0; b < 2 * kNumMatrices; ++b) {
        size_t bytes = 4;
        for (int l = 0; l < filled.store->num_layers(); ++l) {
          const int m = b % kNumMatrices;
          bytes = std::max(
              bytes, static_cast<size_t>(filled.store->layer(l).num_experts) *
                         (b < kNumMatrices ? filled.weight_bytes(l, m) : filled.scale_bytes(l, m)));
        }
        slot.emplace_back(bytes, 0xFF);
        driver->allow_destination(slot.back().data(), bytes);
        slots.back().push_back({slot.back().data(), bytes});
      }
    }
    ok(SlotRing::create(driver, slots, &ring));
  }

  void check(const Filled& filled, const ExpertGroup& group) const {
    const auto& slot = memory[group.slot];
    int64_t wrong = 0;
    for (int x = 0; x < group.num_experts; ++x) {
      for (int m = 0; m < kNumMatrices; ++m) {
        const int expert = group.first_expert + x;
        const size_t bytes = filled.weight_bytes(group.layer, m);
        for (size_t i = 0; i < bytes; ++i) {
          wrong +=
              slot[m][x * bytes + i] != weight_at(group.layer, expert, m, static_cast<int64_t>(i));
        }
        const size_t scales = filled.scale_bytes(group.layer, m);
        for (size_t i = 0; i < scales; ++i) {
          wrong += slot[kNumMatrices + m][x * scales + i] !=
                   scale_byte_at(group.layer, expert, m, static_cast<int64_t>(i));
        }
      }
    }
    JAXMOE_CHECK(wrong == 0, "layer %d, experts %d + %d: %ld wrong", group.layer,
                 group.first_expert, group.num_experts, static_cast<long>(wrong));
  }

  std::vector<std::vector<std::vector<uint8_t>>> memory;
  std::shared_ptr<SlotRing> ring;
};

const std::vector<ExpertGroup> kGroups = {{0, 0, 0, 5}, {1, 1, 0, 3}, {0, 2, 0, 4}, {1, 0, 1, 2},
                                          {0, 0, 4, 1}, {1, 1, 2, 1}, {0, 2, 1, 3}, {1, 3, 0, 3},
                                          {0, 3, 1, 2}, {1, 4, 1, 2}, {0, 5, 0, 2}};

void run_groups(const Filled& filled, Slots& slots, std::shared_ptr<SlotJobs> jobs) {
  ok(slots.ring->start(jobs));
  for (const ExpertGroup& group : kGroups) {
    ok(slots.ring->acquire(group.slot, nullptr));
    slots.check(filled, group);
    for (auto& buffer : slots.memory[group.slot]) std::fill(buffer.begin(), buffer.end(), 0xFF);
    ok(slots.ring->release(group.slot, nullptr));
  }
  ok(slots.ring->finish());
}

}  // namespace

JAXMOE_TEST(a_slot_holds_its_experts_whatever_the_store_is) {
  for (Backing backing : {Backing::kArena, Backing::kMmap}) {
    for (int num_nodes : {1, 2, 3}) {
      Filled filled(num_nodes, backing);
      auto driver = std::make_shared<HostDriver>();
      Slots slots(filled, driver);
      auto jobs = std::make_shared<SlotJobs>();
      ok(append_store_jobs(filled.store, kGroups, jobs.get()));
      JAXMOE_CHECK(jobs->unlocked_bytes > 0);
      run_groups(filled, slots, jobs);
    }
  }
}

JAXMOE_TEST(small_copies_are_gathered) {
  for (int num_nodes : {1, 2}) {
    Filled filled(num_nodes, Backing::kArena);
    auto jobs = std::make_shared<SlotJobs>();
    ok(append_store_jobs(filled.store, {{0, 0, 0, 5}, {1, 1, 0, 3}}, jobs.get()));
    // One of rows for each matrix and node, one for each matrix's scales.
    JAXMOE_CHECK(jobs->jobs[0].copies.size() == static_cast<size_t>(3 * num_nodes + 3), "%zu",
                 jobs->jobs[0].copies.size());
    JAXMOE_CHECK(jobs->jobs[1].copies.size() == static_cast<size_t>(3 * num_nodes), "%zu",
                 jobs->jobs[1].copies.size());
  }
  // In a file whose matrices of a kind follow each other, all of them are one.
  std::shared_ptr<HostStore> store;
  ok(HostStore::create(nodes(2), {{4, 16, 8, WeightFormat::kBf16}}, Backing::kMmap, &store));
  TempDir dir;
  int file_idx = 0;
  ok(store->map_file(dir.write("weights", std::string(3 * 4 * 256, 'w')), &file_idx));
  for (int e = 0; e < 4; ++e) {
    for (int m = 0; m < kNumMatrices; ++m) {
      ok(store->set_mapped(0, e, static_cast<Matrix>(m), file_idx, (m * 4 + e) * 256));
    }
  }
  SlotJobs jobs;
  ok(append_store_jobs(store, {{0, 0, 0, 4}}, &jobs));
  JAXMOE_CHECK(jobs.jobs[0].copies.size() == 3, "%zu", jobs.jobs[0].copies.size());
}

JAXMOE_TEST(copies_stay_within_page_locked_parts) {
  for (Backing backing : {Backing::kArena, Backing::kMmap}) {
    for (int num_nodes : {1, 2}) {
      HostDriverOptions options;
      options.copies_need_registered = true;
      auto driver = std::make_shared<HostDriver>(options);
      Filled filled(num_nodes, backing);
      Slots slots(filled, driver);
      int64_t last = 0, total = 0;
      ok(filled.store->lock_pages(
          driver,
          [&](int64_t done, int64_t all) {
            JAXMOE_CHECK(done > last && done <= all);
            last = done;
            total = all;
            return true;
          },
          1000));
      JAXMOE_CHECK(last == total && driver->registered_bytes() == total &&
                   filled.store->page_lock()->bytes() == total);
      auto jobs = std::make_shared<SlotJobs>();
      ok(append_store_jobs(filled.store, kGroups, jobs.get()));
      JAXMOE_CHECK(jobs->unlocked_bytes == 0);
      run_groups(filled, slots, jobs);
      // The store is unlocked when the last one that uses it lets go.
      filled.store = nullptr;
      JAXMOE_CHECK(driver->registered_bytes() == total);
      jobs = nullptr;
      JAXMOE_CHECK(driver->registered_bytes() == 0);
    }
  }
}

JAXMOE_TEST(locking_is_all_or_nothing) {
  HostDriverOptions options;
  options.max_registered_bytes = 3000;
  auto driver = std::make_shared<HostDriver>(options);
  Filled filled(1, Backing::kArena);
  fails_with(filled.store->lock_pages(driver, {}, 1000),
             "cannot page-lock the experts of NUMA node 0 (bytes 3000 to 4000 of");
  JAXMOE_CHECK(driver->registered_bytes() == 0 && filled.store->page_lock() == nullptr);
  driver = std::make_shared<HostDriver>();
  fails_with(filled.store->lock_pages(
                 driver, [](int64_t, int64_t) { return false; }, 1000),
             "stopped at 1000 of");
  JAXMOE_CHECK(driver->registered_bytes() == 0);
}

JAXMOE_TEST(impossible_groups_are_named) {
  Filled filled(1, Backing::kArena);
  SlotJobs jobs;
  fails_with(append_store_jobs(filled.store, {{0, 6, 0, 1}}, &jobs), "MoE layer 6");
  fails_with(append_store_jobs(filled.store, {{0, 0, -1, 1}}, &jobs), "expert -1");
  fails_with(append_store_jobs(filled.store, {{0, 0, 3, 3}}, &jobs), "expert 5");
  fails_with(append_store_jobs(filled.store, {{0, 0, 3, 0}}, &jobs), "at least one");
  std::shared_ptr<HostStore> empty;
  ok(HostStore::create(nodes(1), kLayers, Backing::kArena, &empty));
  fails_with(append_store_jobs(empty, {{0, 1, 0, 1}}, &jobs), "was not loaded yet");
  JAXMOE_CHECK(jobs.jobs.empty());
}

JAXMOE_TEST_MAIN

// Topology, thread placement, and the pool: every unit once, phases in order, several jobs at a
// time.
#include <time.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>

#include "native_testing.h"
#include "runtime/futex.h"
#include "runtime/registry.h"

using namespace jaxmoe;
using namespace jaxmoe_test;

namespace {

// Two sockets of two cores with two threads each: CPUs 0-3 lead, 4-7 are their siblings.
void write_two_sockets(const TempDir& dir) {
  dir.write("sys/devices/system/node/node0/cpulist", "0-1,4-5\n");
  dir.write("sys/devices/system/node/node1/cpulist", "2-3,6-7\n");
  dir.write("sys/devices/system/node/node2/cpulist", "\n");  // memory only
  for (int cpu = 0; cpu < 8; ++cpu) {
    dir.write("sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/core_cpus_list",
              std::to_string(cpu % 4) + "," + std::to_string(cpu % 4 + 4) + "\n");
  }
}

const std::vector<int> kEight = {0, 1, 2, 3, 4, 5, 6, 7};

}  // namespace

JAXMOE_TEST(cpu_lists) {
  JAXMOE_CHECK((parse_cpu_list("0-3,8,10-11\n") == std::vector<int>{0, 1, 2, 3, 8, 10, 11}));
  JAXMOE_CHECK(parse_cpu_list("\n").empty());
  JAXMOE_CHECK(parse_cpu_list("-3,0-2147483647,5-4,2") == std::vector<int>({2}));
  JAXMOE_CHECK(!allowed_cpus().empty());
}

JAXMOE_TEST(two_sockets) {
  TempDir dir;
  write_two_sockets(dir);
  Topology topology = discover_topology(kEight, dir.path());
  JAXMOE_CHECK(topology.nodes.size() == 2);
  JAXMOE_CHECK((topology.nodes[0].cpus == std::vector<int>{0, 1, 4, 5}));
  JAXMOE_CHECK(topology.nodes[0].num_cores == 2);
  JAXMOE_CHECK(topology.default_threads() == 4);
  // In turn over the nodes, cores before siblings, then around again.
  std::vector<int> cpus, nodes;
  for (const Placement& p : place_threads(topology, 9)) {
    cpus.push_back(p.cpu);
    nodes.push_back(p.node);
  }
  JAXMOE_CHECK((cpus == std::vector<int>{0, 2, 1, 3, 4, 6, 5, 7, 0}));
  JAXMOE_CHECK((nodes == std::vector<int>{0, 1, 0, 1, 0, 1, 0, 1, 0}));
}

JAXMOE_TEST(affinity_mask_counts) {
  TempDir dir;
  write_two_sockets(dir);
  // One node only; of CPU 4's core the leader is not ours, so 4 leads.
  Topology topology = discover_topology({1, 4, 5}, dir.path());
  JAXMOE_CHECK(topology.nodes.size() == 1);
  JAXMOE_CHECK((topology.nodes[0].cpus == std::vector<int>{1, 4, 5}));
  JAXMOE_CHECK(topology.nodes[0].num_cores == 2);
}

JAXMOE_TEST(cgroup_quota_limits_the_default) {
  TempDir dir;
  write_two_sockets(dir);
  dir.write("proc/self/cgroup", "0::/a/b\n");
  dir.write("sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  dir.write("sys/fs/cgroup/a/cpu.max", "250000 100000\n");
  Topology topology = discover_topology(kEight, dir.path());
  JAXMOE_CHECK(topology.cpu_quota == 2.5);
  JAXMOE_CHECK(topology.default_threads() == 2);
  JAXMOE_CHECK(contains(topology.describe(), "2.50 CPUs"));

  TempDir v1;
  write_two_sockets(v1);
  v1.write("proc/self/cgroup", "5:cpuset:/x\n4:cpu,cpuacct:/d\n");
  v1.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "150000\n");  // the container's own root
  v1.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  JAXMOE_CHECK(discover_topology(kEight, v1.path()).default_threads() == 1);
}

JAXMOE_TEST(fake_topologies) {
  Topology topology;
  JAXMOE_CHECK(fake_topology({{0}, {1}}, {0, 1}, &topology).ok());
  JAXMOE_CHECK(topology.fake && topology.nodes.size() == 2);
  Status status = fake_topology({{0}, {7}}, {0, 1}, &topology);
  JAXMOE_CHECK(contains(status.message(), "CPU 7") && contains(status.message(), "0-1"));
  JAXMOE_CHECK(!fake_topology({}, {0}, &topology).ok());
  JAXMOE_CHECK(!fake_topology({{0}, {}}, {0}, &topology).ok());
}

JAXMOE_TEST(runtime_options) {
  RuntimeOptions options;
  std::shared_ptr<CpuRuntime> runtime;
  options.num_threads = 100000;
  JAXMOE_CHECK(contains(CpuRuntime::create(options, &runtime).message(), "100000"));
  options.num_threads = 0;
  JAXMOE_CHECK(CpuRuntime::create(options, &runtime).ok());
  JAXMOE_CHECK(runtime->num_threads() >= 1);
  JAXMOE_CHECK(contains(runtime->describe(), isa_name(best_isa())));
  for (int i = 0; i < kNumIsas; ++i) {
    options.isa = static_cast<Isa>(i);
    Status status = CpuRuntime::create(options, &runtime);
    JAXMOE_CHECK(status.ok() == isa_supported(*options.isa));
  }
}

JAXMOE_TEST(registry_gives_the_lowest_id) {
  Registry<int> registry;
  auto a = std::make_shared<int>(1), b = std::make_shared<int>(2), c = std::make_shared<int>(3);
  JAXMOE_CHECK(registry.add(a) == 0);
  JAXMOE_CHECK(registry.add(b) == 1);
  registry.remove(0, a.get());
  JAXMOE_CHECK(registry.get(0) == nullptr);
  JAXMOE_CHECK(registry.add(c) == 0);
  registry.remove(0, a.get());  // 0 is c's by now
  JAXMOE_CHECK(registry.get(0) == c);
  JAXMOE_CHECK(registry.get(-1) == nullptr && registry.get(1000) == nullptr);
  for (int i = 2; i < Registry<int>::kCapacity; ++i) JAXMOE_CHECK(registry.add(a) == i);
  JAXMOE_CHECK(registry.add(a) == -1);
}

namespace {

// Counts every unit; units of a phase wait until all units of the phases before have been counted.
class CountingJob final : public Job {
 public:
  explicit CountingJob(const JobShape& shape) : shape_(shape) {
    for (int p = 0; p < shape.phases; ++p) {
      for (int n = 0; n < shape.nodes; ++n) {
        runs_[p][n] = std::vector<std::atomic<int>>(shape.units[p][n]);
        left_[p] += shape.units[p][n];
      }
    }
  }
  void run_unit(int phase, int node, uint32_t unit, int participant) noexcept override {
    for (int p = 0; p < phase; ++p) {
      wait_for_peer([this, p] { return left_[p].load(std::memory_order_acquire) == 0; });
    }
    runs_[phase][node][unit].fetch_add(1, std::memory_order_relaxed);
    // Unsynchronised on purpose: two threads with one participant number would be a race.
    work_[participant * 16] += 1;
    left_[phase].fetch_sub(1, std::memory_order_acq_rel);
  }
  bool all_once() const {
    for (int p = 0; p < shape_.phases; ++p) {
      for (int n = 0; n < shape_.nodes; ++n) {
        for (const std::atomic<int>& runs : runs_[p][n]) {
          if (runs.load() != 1) return false;
        }
      }
    }
    return true;
  }
  long total_work() const { return std::accumulate(work_.begin(), work_.end(), 0l); }

 private:
  JobShape shape_;
  std::vector<std::atomic<int>> runs_[kMaxPhases][kMaxNodes];
  std::atomic<uint32_t> left_[kMaxPhases] = {};
  std::vector<long> work_ = std::vector<long>(64 * 16);
};

JobShape random_shape(Random& random, int nodes) {
  JobShape shape;
  shape.phases = 1 + random.below(kMaxPhases);
  shape.nodes = nodes;
  for (int p = 0; p < shape.phases; ++p) {
    for (int n = 0; n < nodes; ++n) {
      shape.units[p][n] = static_cast<uint32_t>(random.below(40) * random.below(3));
    }
  }
  return shape;
}

}  // namespace

JAXMOE_TEST(spread_covers_all_units) {
  JobShape shape;
  shape.nodes = 3;
  for (uint32_t count : {0u, 1u, 2u, 7u, 3000u}) {
    shape.spread(0, count);
    JAXMOE_CHECK(shape.units[0][0] + shape.units[0][1] + shape.units[0][2] == count);
  }
}

JAXMOE_TEST(every_unit_runs_once_and_phases_wait_without_deadlock) {
  for (int nodes : {0, 2, 3}) {
    for (int threads : {1, 2, 4}) {
      auto runtime = make_runtime(threads, nodes);
      Random random(static_cast<uint64_t>(threads * 10 + nodes));
      for (int i = 0; i < 150; ++i) {
        JobShape shape = random_shape(random, std::max(nodes, 1));
        CountingJob job(shape);
        JobSlot* slot = runtime->pool().acquire();
        if (i % 7 == 0) {
          runtime->pool().run_alone(&job, shape);
        } else {
          runtime->pool().run(slot, &job, shape);
        }
        runtime->pool().release(slot);
        JAXMOE_CHECK(job.all_once());
        JAXMOE_CHECK(job.total_work() == static_cast<long>(shape.total()));
      }
    }
  }
}

JAXMOE_TEST(concurrent_callers_and_open_jobs) {
  auto runtime = make_runtime(3, 2);
  auto caller = [&runtime](int seed) {
    Random random(static_cast<uint64_t>(seed));
    for (int i = 0; i < 60; ++i) {
      JobShape open_shape = random_shape(random, 2), shape = random_shape(random, 2);
      CountingJob open_job(open_shape), job(shape);
      JobSlot* open_slot = runtime->pool().acquire();
      runtime->pool().start(open_slot, &open_job, open_shape);
      JobSlot* slot = runtime->pool().acquire();
      runtime->pool().run(slot, &job, shape);
      runtime->pool().release(slot);
      JAXMOE_CHECK(job.all_once());
      // Sometimes long enough for the workers to fall asleep.
      if (i % 20 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      runtime->pool().finish(open_slot);
      runtime->pool().release(open_slot);
      JAXMOE_CHECK(open_job.all_once());
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(caller, i + 1);
  for (std::thread& thread : callers) thread.join();
}

JAXMOE_TEST(slots_run_out_and_come_back) {
  auto runtime = make_runtime(2);
  std::vector<JobSlot*> slots;
  while (JobSlot* slot = runtime->pool().try_acquire()) slots.push_back(slot);
  JAXMOE_CHECK(slots.size() == static_cast<size_t>(kMaxOpenJobs));
  for (JobSlot* slot : slots) runtime->pool().release(slot);
  JobSlot* slot = runtime->pool().try_acquire();
  JAXMOE_CHECK(slot != nullptr);
  runtime->pool().release(slot);
}

JAXMOE_TEST(an_idle_pool_burns_no_time) {
  auto runtime = make_runtime(4);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // patience runs out
  auto cpu_seconds = [] {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  double used = cpu_seconds() - before;
  JAXMOE_CHECK(used < 0.02, "an idle pool used %.3f s of CPU in 0.2 s", used);
}

JAXMOE_TEST(scratch_keeps_its_size) {
  Scratch scratch;
  JAXMOE_CHECK(scratch.reserve(1000));
  char* data = scratch.data();
  JAXMOE_CHECK(reinterpret_cast<uintptr_t>(data) % kCacheLine == 0);
  JAXMOE_CHECK(scratch.reserve(10) && scratch.reserve(1000) && scratch.data() == data);
}

JAXMOE_TEST_MAIN

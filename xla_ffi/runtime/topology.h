// Which CPUs this process may use, and how they lie on NUMA nodes and cores.
//
// Respects the affinity mask and the cgroup CPU quota. A fake topology can be given instead, so
// that everything that splits over nodes is tested on any machine.
#ifndef JAXMOE_RUNTIME_TOPOLOGY_H_
#define JAXMOE_RUNTIME_TOPOLOGY_H_

#include <string>
#include <vector>

#include "runtime/status.h"

namespace jaxmoe {

struct NumaNode {
  int node_id = 0;        // the operating system's number; for memory binding
  std::vector<int> cpus;  // one logical CPU of each core first, then their SMT siblings
  int num_cores = 0;      // how many of `cpus` lead a core
};

struct Topology {
  std::vector<NumaNode> nodes;  // only nodes with usable CPUs; never empty
  bool fake = false;            // given by the caller: memory is not bound
  double cpu_quota = 0;         // CPUs' worth of time the cgroup grants; 0: no limit

  int num_cpus() const;
  int num_cores() const;
  // One thread a core, no more than the quota pays for: SMT siblings share the load ports that
  // decoding needs, and threads beyond the quota are put to sleep in the middle of an operation.
  int default_threads() const;
  std::string describe() const;
};

// Reads /sys and /proc under `root` (tests pass a made-up tree) for the CPUs of `allowed`.
Topology discover_topology(const std::vector<int>& allowed, const std::string& root = "");
std::vector<int> allowed_cpus();  // this thread's affinity mask

// Checks that every CPU is in `allowed`; a CPU may be named by several nodes.
Status fake_topology(const std::vector<std::vector<int>>& nodes, const std::vector<int>& allowed,
                     Topology* topology);

struct Placement {
  int node = 0;  // index into Topology::nodes
  int cpu = 0;
};

// Spreads threads over the nodes in turn, cores before SMT siblings; wraps around when there are
// more threads than CPUs.
std::vector<Placement> place_threads(const Topology& topology, int num_threads);

// Parses "0-3,8,10-11".
std::vector<int> parse_cpu_list(const std::string& text);

}  // namespace jaxmoe

#endif  // JAXMOE_RUNTIME_TOPOLOGY_H_

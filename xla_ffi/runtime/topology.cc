#include "runtime/topology.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

namespace jaxmoe {
namespace {

bool read_line(const std::string& path, std::string* line) {
  std::ifstream file(path);
  return static_cast<bool>(std::getline(file, *line));
}

// CPUs' worth of time granted by the tightest limit on the way from this process's cgroup to the
// root; 0: none.
double cgroup_quota(const std::string& root) {
  double tightest = 0;
  auto limit = [&tightest](double quota, double period) {
    if (quota > 0 && period > 0) {
      double cpus = quota / period;
      tightest = tightest == 0 ? cpus : std::min(tightest, cpus);
    }
  };
  std::ifstream membership(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(membership, line)) {  // "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1)
    size_t first = line.find(':');
    size_t second = line.find(':', first == std::string::npos ? first : first + 1);
    if (second == std::string::npos) continue;
    std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    std::string base = root + "/sys/fs/cgroup" + (v2 ? "" : "/cpu");
    // Inside a container the path may name the host's view; each prefix that exists here counts.
    for (;;) {
      std::string value;
      if (v2) {
        if (read_line(base + path + "/cpu.max", &value)) {
          double quota = 0, period = 0;
          if (std::sscanf(value.c_str(), "%lf %lf", &quota, &period) == 2) limit(quota, period);
        }
      } else {
        std::string period;
        if (read_line(base + path + "/cpu.cfs_quota_us", &value) &&
            read_line(base + path + "/cpu.cfs_period_us", &period)) {
          limit(std::atof(value.c_str()), std::atof(period.c_str()));
        }
      }
      size_t slash = path.rfind('/');
      if (path.empty() || slash == std::string::npos) break;
      path.resize(slash);
    }
  }
  return tightest;
}

// Fills cpus with core leaders first: a CPU leads its core when it is the lowest usable one of its
// siblings.
void order_by_core(const std::string& root, std::vector<int> usable, NumaNode* node) {
  std::sort(usable.begin(), usable.end());
  std::set<int> set(usable.begin(), usable.end());
  std::vector<int> siblings;
  for (int cpu : usable) {
    std::string line;
    std::string base = root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    bool leads = true;
    if (read_line(base + "core_cpus_list", &line) ||
        read_line(base + "thread_siblings_list", &line)) {
      for (int sibling : parse_cpu_list(line)) {
        if (sibling < cpu && set.count(sibling)) leads = false;
      }
    }
    (leads ? node->cpus : siblings).push_back(cpu);
  }
  node->num_cores = static_cast<int>(node->cpus.size());
  node->cpus.insert(node->cpus.end(), siblings.begin(), siblings.end());
}

std::string format_cpu_list(std::vector<int> cpus) {
  std::sort(cpus.begin(), cpus.end());
  std::string text;
  for (size_t i = 0; i < cpus.size();) {
    size_t j = i;
    while (j + 1 < cpus.size() && cpus[j + 1] == cpus[j] + 1) ++j;
    if (!text.empty()) text += ",";
    text += std::to_string(cpus[i]);
    if (j > i) text.append("-").append(std::to_string(cpus[j]));
    i = j + 1;
  }
  return text;
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string& text) {
  constexpr int kMaxCpus = 1 << 16;
  std::vector<int> cpus;
  std::stringstream stream(text);
  std::string part;
  while (std::getline(stream, part, ',')) {
    int first = 0, last = 0;
    int fields = std::sscanf(part.c_str(), "%d-%d", &first, &last);
    if (fields < 1) continue;
    if (fields == 1) last = first;
    if (first < 0 || last >= kMaxCpus) continue;  // no kernel has so many
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

std::vector<int> allowed_cpus() {
  // The kernel refuses masks smaller than its own CPU count, so grow until it fits.
  for (int count = 1024; count <= (1 << 20); count *= 2) {
    cpu_set_t* set = CPU_ALLOC(count);
    size_t bytes = CPU_ALLOC_SIZE(count);
    std::vector<int> cpus;
    bool ok = sched_getaffinity(0, bytes, set) == 0;
    if (ok) {
      for (int cpu = 0; cpu < count; ++cpu) {
        if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
      }
    }
    CPU_FREE(set);
    if (ok) return cpus;
  }
  return {0};
}

Topology discover_topology(const std::vector<int>& allowed, const std::string& root) {
  Topology topology;
  topology.cpu_quota = cgroup_quota(root);
  std::set<int> left(allowed.begin(), allowed.end());
  std::error_code ignored;
  std::vector<int> node_ids;
  for (const auto& entry :
       std::filesystem::directory_iterator(root + "/sys/devices/system/node", ignored)) {
    int id = 0;
    char rest = 0;
    if (std::sscanf(entry.path().filename().c_str(), "node%d%c", &id, &rest) == 1) {
      node_ids.push_back(id);
    }
  }
  std::sort(node_ids.begin(), node_ids.end());
  for (int id : node_ids) {
    std::string line;
    if (!read_line(root + "/sys/devices/system/node/node" + std::to_string(id) + "/cpulist",
                   &line)) {
      continue;
    }
    std::vector<int> usable;
    for (int cpu : parse_cpu_list(line)) {
      if (left.erase(cpu)) usable.push_back(cpu);
    }
    if (usable.empty()) continue;  // memory-only node, or none of its CPUs is ours
    NumaNode node;
    node.node_id = id;
    order_by_core(root, usable, &node);
    topology.nodes.push_back(std::move(node));
  }
  if (topology.nodes.empty()) {  // no /sys: one node
    NumaNode node;
    order_by_core(root, allowed, &node);
    topology.nodes.push_back(std::move(node));
  }
  return topology;
}

Status fake_topology(const std::vector<std::vector<int>>& nodes, const std::vector<int>& allowed,
                     Topology* topology) {
  topology->fake = true;
  topology->nodes.clear();
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].empty()) {
      return Status::error("numa_nodes[" + std::to_string(i) +
                           "] is empty: every node needs a CPU");
    }
    NumaNode node;
    node.node_id = static_cast<int>(i);
    for (int cpu : nodes[i]) {
      if (std::find(allowed.begin(), allowed.end(), cpu) == allowed.end()) {
        return Status::error("numa_nodes[" + std::to_string(i) + "] names CPU " +
                             std::to_string(cpu) + ", but this process may use CPUs " +
                             format_cpu_list(allowed) + " only");
      }
      node.cpus.push_back(cpu);
    }
    node.num_cores = static_cast<int>(node.cpus.size());
    topology->nodes.push_back(std::move(node));
  }
  if (nodes.empty()) return Status::error("numa_nodes is empty: give at least one node, or None");
  return {};
}

int Topology::num_cpus() const {
  int count = 0;
  for (const NumaNode& node : nodes) count += static_cast<int>(node.cpus.size());
  return count;
}

int Topology::num_cores() const {
  int count = 0;
  for (const NumaNode& node : nodes) count += node.num_cores;
  return count;
}

int Topology::default_threads() const {
  int threads = num_cores();
  if (cpu_quota > 0) threads = std::min(threads, static_cast<int>(std::floor(cpu_quota)));
  return std::max(threads, 1);
}

std::string Topology::describe() const {
  std::string text;
  for (const NumaNode& node : nodes) {
    if (!text.empty()) text += "; ";
    text += std::string(fake ? "fake " : "") + "NUMA node " + std::to_string(node.node_id) +
            ": CPUs " + format_cpu_list(node.cpus) + " (" + std::to_string(node.num_cores) +
            " cores)";
  }
  if (cpu_quota > 0) {
    char quota[64];
    std::snprintf(quota, sizeof(quota), "; cgroup grants %.2f CPUs", cpu_quota);
    text += quota;
  }
  return text;
}

std::vector<Placement> place_threads(const Topology& topology, int num_threads) {
  // Rounds over the nodes: first every node's cores, then every node's siblings.
  std::vector<Placement> order;
  for (bool leaders : {true, false}) {
    size_t most = 0;
    for (const NumaNode& node : topology.nodes) most = std::max(most, node.cpus.size());
    for (size_t i = 0; i < most; ++i) {
      for (size_t n = 0; n < topology.nodes.size(); ++n) {
        const NumaNode& node = topology.nodes[n];
        bool is_leader = i < static_cast<size_t>(node.num_cores);
        if (i < node.cpus.size() && is_leader == leaders) {
          order.push_back({static_cast<int>(n), node.cpus[i]});
        }
      }
    }
  }
  std::vector<Placement> placement;
  for (int i = 0; i < num_threads; ++i) placement.push_back(order[i % order.size()]);
  return placement;
}

}  // namespace jaxmoe

// The parser of the kernel's CPU lists, and a topology made of whatever /sys says.
#include <filesystem>
#include <fstream>

#include "fuzz_input.h"
#include "runtime/topology.h"

using namespace jaxmoe;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  jaxmoe_fuzz::Input input(data, size);
  bool whole = input.byte() & 1;
  std::string text = input.rest();
  for (int cpu : parse_cpu_list(text)) {
    jaxmoe_fuzz::require(cpu >= 0, "a CPU has a number");
  }
  if (!whole) return 0;
  static const std::string root = [] {
    char name[] = "/tmp/jaxmoe_fuzz_XXXXXX";
    return std::string(mkdtemp(name));
  }();
  auto put = [&](const std::string& path) {
    std::filesystem::path file = root + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file, std::ios::binary) << text;
  };
  put("/sys/devices/system/node/node0/cpulist");
  put("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list");
  put("/sys/devices/system/cpu/cpu1/topology/thread_siblings_list");
  put("/sys/fs/cgroup/cpu.max");
  put("/proc/self/cgroup");
  Topology topology = discover_topology({0, 1}, root);
  jaxmoe_fuzz::require(!topology.nodes.empty() && topology.num_cpus() >= 1, "there is a CPU");
  jaxmoe_fuzz::require(topology.default_threads() >= 1, "there is a thread");
  return 0;
}

// What the tests of the native core share: random numbers, made-up files, runtimes.
#ifndef JAXMOE_TESTS_NATIVE_TESTING_H_
#define JAXMOE_TESTS_NATIVE_TESTING_H_

#include <sched.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "runtime/cpu_runtime.h"

namespace jaxmoe_test {

// A fixed sequence: the same test on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    uint32_t x = static_cast<uint32_t>(state_ >> 33);
    return x ^ x >> 15;
  }
  // Roughly normal, in [-2, 2].
  float value() {
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>(bits() & 0xffff) / 65536.0f;
    return sum - 2.0f;
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint32_t>(n)); }

 private:
  uint64_t state_;
};

// A directory that goes away with the test.
class TempDir {
 public:
  TempDir() {
    char name[] = "/tmp/jaxmoe_test_XXXXXX";
    path_ = mkdtemp(name);
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  std::string write(const std::string& name, const std::string& content) const {
    std::filesystem::path file = std::filesystem::path(path_) / name;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file, std::ios::binary) << content;
    return file.string();
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// A runtime on CPUs this process may use: `nodes` fake nodes (0: the machine's own topology).
inline std::shared_ptr<jaxmoe::CpuRuntime> make_runtime(int threads, int nodes = 0,
                                                        jaxmoe::Isa isa = jaxmoe::best_isa()) {
  jaxmoe::RuntimeOptions options;
  options.num_threads = threads;
  options.isa = isa;
  if (nodes > 0) {
    std::vector<int> cpus = jaxmoe::allowed_cpus();
    options.fake_nodes.emplace();
    for (int i = 0; i < nodes; ++i) {
      options.fake_nodes->push_back({cpus[static_cast<size_t>(i) % cpus.size()]});
    }
  }
  std::shared_ptr<jaxmoe::CpuRuntime> runtime;
  jaxmoe::Status status = jaxmoe::CpuRuntime::create(options, &runtime);
  JAXMOE_CHECK(status.ok(), "%s", status.message().c_str());
  return runtime;
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace jaxmoe_test

#endif  // JAXMOE_TESTS_NATIVE_TESTING_H_

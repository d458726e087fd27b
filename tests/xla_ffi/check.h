// The few lines of test framework the C++ tests need: no download, no dependency.
#ifndef JAXMOE_TESTS_CHECK_H_
#define JAXMOE_TESTS_CHECK_H_

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace jaxmoe_test {

struct Case {
  const char* name;
  std::function<void()> body;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, std::function<void()> body) {
    cases().push_back({name, std::move(body)});
  }
};

inline int run_all() {
  int failed_cases = 0;
  for (const Case& test : cases()) {
    int before = failures();
    test.body();
    bool ok = failures() == before;
    failed_cases += !ok;
    std::printf("%s %s\n", ok ? "ok  " : "FAIL", test.name);
  }
  std::printf("%zu cases, %d failed\n", cases().size(), failed_cases);
  // A binary without cases proves nothing.
  return cases().empty() || failed_cases ? EXIT_FAILURE : EXIT_SUCCESS;
}

}  // namespace jaxmoe_test

#define JAXMOE_TEST(name)                                            \
  static void name();                                                \
  static const ::jaxmoe_test::Register register_##name(#name, name); \
  static void name()

#define JAXMOE_CHECK(condition, ...)                                           \
  do {                                                                         \
    if (!(condition)) {                                                        \
      ++::jaxmoe_test::failures();                                             \
      std::printf("%s:%d: CHECK failed: %s ", __FILE__, __LINE__, #condition); \
      __VA_OPT__(std::printf(__VA_ARGS__);)                                    \
      std::printf("\n");                                                       \
    }                                                                          \
  } while (0)

#define JAXMOE_TEST_MAIN \
  int main() { return ::jaxmoe_test::run_all(); }

#endif  // JAXMOE_TESTS_CHECK_H_

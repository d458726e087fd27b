// Which instruction sets this CPU and operating system give us, asked once, and the tables filled
// from it.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <string>

#include "kernels/isa_tables.h"

namespace jaxmoe {
namespace {

constexpr unsigned long kXcr0Avx = 0x6;      // SSE, AVX state
constexpr unsigned long kXcr0Avx512 = 0xE6;  // + opmask, upper ZMM, ZMM16-31
constexpr unsigned long kXcr0Amx = 0x60000;  // tile configuration, tile data
constexpr long kArchReqXcompPerm = 0x1023;
constexpr long kXfeatureTileData = 18;

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

unsigned long xgetbv0() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long>(high) << 32) | low;
}

bool bit(unsigned value, int index) { return (value >> index) & 1u; }

// `missing` collects what each instruction set lacks here; empty means supported.
struct Support {
  std::string missing[kNumIsas];
  Isa best = Isa::kScalar;
  std::string reason;
  isa_tables::Traits traits;

  static void need(std::string& list, bool present, const char* name) {
    if (present) return;
    if (!list.empty()) list += ", ";
    list += name;
  }

  Support() {
    const Registers leaf1 = cpuid(1, 0);
    const Registers leaf7 = cpuid(7, 0);
    const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};
    const bool osxsave = bit(leaf1.ecx, 27);
    const unsigned long xcr0 = osxsave ? xgetbv0() : 0;

    std::string list;
    need(list, bit(leaf7.ebx, 5), "AVX2");
    need(list, bit(leaf1.ecx, 12), "FMA");
    need(list, bit(leaf1.ecx, 29), "F16C");
    need(list, (xcr0 & kXcr0Avx) == kXcr0Avx, "AVX state enabled by the operating system");
    missing[static_cast<int>(Isa::kAvx2)] = list;

    need(list, bit(leaf7.ebx, 16), "AVX512F");
    need(list, bit(leaf7.ebx, 17), "AVX512DQ");
    need(list, bit(leaf7.ebx, 30), "AVX512BW");
    need(list, bit(leaf7.ebx, 31), "AVX512VL");
    need(list, (xcr0 & kXcr0Avx512) == kXcr0Avx512,
         "AVX-512 state enabled by the operating system");
    missing[static_cast<int>(Isa::kAvx512)] = list;

    need(list, bit(leaf7.ecx, 1), "AVX512_VBMI");
    need(list, bit(leaf7_1.eax, 5), "AVX512_BF16");
    missing[static_cast<int>(Isa::kAvx512Bf16)] = list;

    need(list, bit(leaf7.edx, 24), "AMX-TILE");
    need(list, bit(leaf7.edx, 22), "AMX-BF16");
    const bool tile_state = (xcr0 & kXcr0Amx) == kXcr0Amx;
    need(list, tile_state, "AMX state enabled by the operating system");
    if (list.empty()) {
      // Granted to the process once; every thread started later has it too.
      need(list, syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0,
           "permission for AMX tile data (arch_prctl refused)");
    }
    missing[static_cast<int>(Isa::kAmx)] = list;

    const Registers leaf0 = cpuid(0, 0);
    // "AuthenticAMD"; Hygon's CPUs are Zen too ("HygonGenuine").
    const bool zen = leaf0.ebx == 0x68747541u || leaf0.ebx == 0x6f677948u;
    traits.one_stream = zen;
    traits.fast_bf16_dot = zen;

    for (int i = 0; i < kNumIsas; ++i) {
      if (missing[i].empty()) best = static_cast<Isa>(i);
    }
    reason = std::string(isa_name(best)) + ": the highest this machine supports";
    if (best != Isa::kAmx) {
      const int next = static_cast<int>(best) + 1;
      reason += std::string("; ") + isa_name(static_cast<Isa>(next)) + " lacks " + missing[next];
    }
    if (traits.one_stream) reason += "; reads one weight row at a time, as Zen's prefetchers like";
  }
};

const Support& support() {
  static const Support instance;
  return instance;
}

struct Tables {
  KernelTable table[kNumIsas];

  Tables() {
    for (int i = 0; i < kNumIsas; ++i) {
      const Isa isa = static_cast<Isa>(i);
      // Filling runs code of that instruction set's file: only where it is supported.
      if (isa_supported(isa)) table[i] = isa_tables::make_table(isa, support().traits);
    }
  }
};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

bool isa_supported(Isa isa) { return support().missing[static_cast<int>(isa)].empty(); }

Isa best_isa() { return support().best; }

const char* isa_reason() { return support().reason.c_str(); }

KernelTable isa_tables::make_table(Isa isa, const Traits& traits) {
  using Fill = void (*)(KernelTable&, const Traits&);
  constexpr Fill kFill[kNumIsas] = {fill_scalar, fill_avx2, fill_avx512, fill_avx512bf16, fill_amx};
  KernelTable table;
  table.isa = isa;
  for (int i = 0; i <= static_cast<int>(isa); ++i) kFill[i](table, traits);
  return table;
}

const KernelTable& kernel_table(Isa isa) {
  static const Tables tables;
  return tables.table[static_cast<int>(isa)];
}

Family select_family(Family family, ActivationType activation) {
  if (activation == ActivationType::kF32) return Family::kVector;
  return family == Family::kVector ? Family::kVectorBf16 : family;
}

const MatmulKernel& select_kernel(const KernelTable& table, Family family, WeightFormat format,
                                  ActivationType activation) {
  return table
      .matmul[static_cast<int>(select_family(family, activation))][static_cast<int>(format)];
}

void kernel_thread_init(Isa isa) {
  if (isa == Isa::kAmx) isa_tables::amx_thread_init();
}

void kernel_thread_release(Isa isa) {
  if (isa == Isa::kAmx) isa_tables::amx_thread_release();
}

}  // namespace jaxmoe

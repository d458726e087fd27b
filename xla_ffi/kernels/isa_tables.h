// What each instruction set's translation unit gives to dispatch.cc: one function that overwrites
// the entries it has its own form of. A table is filled from kScalar upwards to its own instruction
// set.
//
// Rule of this folder: a file compiled with instruction-set flags defines nothing with external
// linkage but its fill function. Shared algorithm text lives in *.inl files that are included
// inside an anonymous namespace of each file, and calls no inline function of another header: the
// linker keeps one copy of such a function, and it might be the AVX-512 one.
#ifndef JAXMOE_KERNELS_ISA_TABLES_H_
#define JAXMOE_KERNELS_ISA_TABLES_H_

#include "kernels/kernels.h"

namespace jaxmoe::isa_tables {

// What CPUs of one instruction set differ in. All of it is known from the vendor, so that a machine
// gives the same bits at every start.
struct Traits {
  // Reads one stream of memory faster than eight (OneRow in matmul_rows.inl). Measured on Zen 4:
  // 27 GB/s of 32 with one row, 13 to 20 with two to eight.
  bool one_stream = false;
  // vdpbf16ps at the rate of vfmadd (Zen 4: one a cycle both; Sapphire Rapids: half of it).
  bool fast_bf16_dot = false;
};

void fill_scalar(KernelTable& table, const Traits& traits);
void fill_avx2(KernelTable& table, const Traits& traits);
void fill_avx512(KernelTable& table, const Traits& traits);
void fill_avx512bf16(KernelTable& table, const Traits& traits);
void fill_amx(KernelTable& table, const Traits& traits);

// The table of an instruction set (supported here) on a CPU with these traits; kernel_table() is
// that of this CPU. For tests: both forms run on every CPU.
KernelTable make_table(Isa isa, const Traits& traits);

// Loads / releases this thread's tile configuration. AMX must be supported.
void amx_thread_init();
void amx_thread_release();

}  // namespace jaxmoe::isa_tables

#endif  // JAXMOE_KERNELS_ISA_TABLES_H_

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

void fill_scalar(KernelTable& table);
void fill_avx2(KernelTable& table);
void fill_avx512(KernelTable& table);
void fill_avx512bf16(KernelTable& table);
void fill_amx(KernelTable& table);

// Loads / releases this thread's tile configuration. AMX must be supported.
void amx_thread_init();
void amx_thread_release();

}  // namespace jaxmoe::isa_tables

#endif  // JAXMOE_KERNELS_ISA_TABLES_H_

#include "kernels/isa_tables.h"

namespace jaxmoe::isa_tables {

void fill_amx(KernelTable&) {}
void amx_thread_init() {}
void amx_thread_release() {}
}  // namespace jaxmoe::isa_tables

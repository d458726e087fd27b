#include "kernels/isa_tables.h"

namespace jaxmoe::isa_tables {

void fill_avx512bf16(KernelTable&) {}

}  // namespace jaxmoe::isa_tables

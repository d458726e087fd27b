# Compile flags of each instruction set. FP contraction is off: kernels say themselves where they fuse, so that
# results do not depend on the compiler. Speed matters in debug and sanitizer builds too (-O2 at least): the
# kernels are straight-line code that nobody steps through, and unoptimised they run a hundred times slower.
set(JAXMOE_ISA_FLAGS_SCALAR -mno-avx)
set(JAXMOE_ISA_FLAGS_AVX2 -mavx2 -mfma -mf16c)
set(JAXMOE_ISA_FLAGS_AVX512 ${JAXMOE_ISA_FLAGS_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mprefer-vector-width=512
    # g++ 12 warns about the _mm512_undefined_* of its own headers (GCC bug 105593).
    -Wno-maybe-uninitialized)
set(JAXMOE_ISA_FLAGS_AVX512BF16 ${JAXMOE_ISA_FLAGS_AVX512} -mavx512vbmi -mavx512bf16)
set(JAXMOE_ISA_FLAGS_AMX ${JAXMOE_ISA_FLAGS_AVX512BF16} -mamx-tile -mamx-bf16)

function(jaxmoe_isa_source source isa)
  if(NOT DEFINED JAXMOE_ISA_FLAGS_${isa})
    message(FATAL_ERROR "no instruction-set flags named ${isa} for ${source}; see IsaFlags.cmake")
  endif()
  set(checks "")
  if(JAXMOE_SANITIZE MATCHES "undefined")
    # The unrolled kernels would take tens of minutes to compile with a branch at every operation; what they may
    # get wrong, reading outside a matrix, is AddressSanitizer's and kernels_memory_test's to find.
    set(checks ";-fno-sanitize=undefined")
  endif()
  set_source_files_properties(${source} PROPERTIES
    COMPILE_OPTIONS "-O3;-ffp-contract=off;${JAXMOE_ISA_FLAGS_${isa}}${checks}")
endfunction()

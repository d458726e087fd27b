# Compile flags of each instruction set. FP contraction is off: kernels say themselves where they fuse, so that
# results do not depend on the compiler. Speed matters in debug builds too: the kernels are straight-line code that
# nobody steps through, and unoptimised they run a hundred times slower.
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
  set(checks "")  # what sanitizers need
  set(optimize -O3)
  if(JAXMOE_SANITIZE)
    # Nearly as fast here, and it compiles several times faster: -O3 unrolls every checked load of every tile.
    set(optimize -O1)
  endif()
  if(JAXMOE_SANITIZE MATCHES "undefined")
    # The unrolled kernels would take tens of minutes to compile with a branch at every operation; what they may
    # get wrong, reading outside a matrix, is AddressSanitizer's and kernels_memory_test's to find.
    list(APPEND checks -fno-sanitize=undefined)
  endif()
  if(JAXMOE_SANITIZE AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # The checks multiply the branches, and gcc's usual register allocation grows faster than those: 90 of 110 s.
    list(APPEND checks -fira-region=one -fira-algorithm=priority)
  endif()
  set_source_files_properties(${source} PROPERTIES
    COMPILE_OPTIONS "${optimize};-ffp-contract=off;${JAXMOE_ISA_FLAGS_${isa}};${checks}")
endfunction()

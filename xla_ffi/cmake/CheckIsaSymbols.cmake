# Test script: an object compiled with instruction-set flags may define, for others to link, nothing but its
# isa_tables functions. A shared inline function or template here could become the one copy that the whole
# program uses, and crash on machines without the instructions.
#   cmake -DNM=nm -DOBJECTS=a.o,b.o -P CheckIsaSymbols.cmake
string(REPLACE "," ";" objects "${OBJECTS}")
set(checked 0)
foreach(object ${objects})
  if(NOT object MATCHES "matmul_[a-z0-9]+\\.cc")
    continue()
  endif()
  math(EXPR checked "${checked} + 1")
  execute_process(COMMAND ${NM} -C --extern-only --defined-only ${object}
                  OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX REPLACE "\n+$" "" output "${output}")
  string(REPLACE ";" "," output "${output}")
  string(REPLACE "\n" ";" symbols "${output}")
  foreach(symbol ${symbols})
    # DW.ref.* are the compiler's own data references to its exception support.
    if(NOT symbol MATCHES " T jaxmoe::isa_tables::" AND NOT symbol MATCHES " DW\\.ref\\.")
      message(SEND_ERROR "${object} defines a symbol others may link: ${symbol}")
    endif()
  endforeach()
endforeach()
if(checked EQUAL 0)
  message(FATAL_ERROR "no matmul_*.cc object among: ${OBJECTS}")
endif()
message(STATUS "${checked} objects define nothing but isa_tables functions")

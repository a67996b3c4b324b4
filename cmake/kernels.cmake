# How an op's CUDA sources become part of moebert_kernels/_C: architectures, flags, and what is left out, by name.

enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_ARCHITECTURES OFF) # each source gets its own -gencode
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)

# sm_90a, clusters and tensor maps came with CUDA 12.0.
if(CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  message(FATAL_ERROR "the CUDA kernels need nvcc 12.0 or newer, got ${CMAKE_CUDA_COMPILER_VERSION}: "
                      "install a newer CUDA toolkit and name it with CUDA_HOME")
endif()

set(mbk_archs ${MBK_CUDA_ARCHS})
if(NOT mbk_archs)
  set(mbk_archs 80 90a)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND mbk_archs 100a)
  endif()
endif()
foreach(arch IN LISTS mbk_archs)
  if(NOT arch MATCHES "^[0-9]+[af]?$")
    message(FATAL_ERROR "MBK_CUDA_ARCHS: expected numbers such as 80;90a;100a, got ${arch}")
  endif()
endforeach()
# For the GPUs that are not in the list: PTX of the first arch in it, without the letter that would tie it to one GPU.
list(GET mbk_archs 0 mbk_ptx)
string(REGEX REPLACE "[af]$" "" mbk_ptx "${mbk_ptx}")

set(mbk_flags -Xcompiler=-Wall,-Wextra --threads=4 -Xfatbin=-compress-all)
if(MBK_WERROR)
  list(APPEND mbk_flags -Werror=all-warnings)
endif()

add_library(mbk_core STATIC)
target_include_directories(mbk_core PUBLIC ${PROJECT_SOURCE_DIR}/csrc)
target_include_directories(mbk_core SYSTEM PUBLIC ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(mbk_core PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${mbk_flags}>)
set(mbk_ops "")
set(mbk_bindings "")
set(mbk_left_out "")

function(mbk_leave_out op reason)
  message(WARNING "${op} is left out: ${reason}")
  list(APPEND mbk_left_out "\"${op}\": \"${reason}\"")
  set(mbk_left_out "${mbk_left_out}" PARENT_SCOPE)
endfunction()

# Adds an op. A binding defines `void mbk::bind_<op>(pybind11::module_&)`, which the module calls.
#   ARCHS: those that it has code for, where these are not all; no PTX then.
#   CUTLASS: it needs the headers of MBK_CUTLASS_INCLUDE.
macro(mbk_op op)
  cmake_parse_arguments(ARG "CUTLASS" "" "SOURCES;BINDING;ARCHS" ${ARGN})
  set(op_archs ${mbk_archs})
  set(op_flags "")
  if(ARG_ARCHS)
    set(op_archs "")
    foreach(arch IN LISTS ARG_ARCHS)
      if(arch IN_LIST mbk_archs)
        list(APPEND op_archs ${arch})
      endif()
    endforeach()
  else()
    set(op_flags -gencode=arch=compute_${mbk_ptx},code=compute_${mbk_ptx})
  endif()
  foreach(arch IN LISTS op_archs)
    list(APPEND op_flags -gencode=arch=compute_${arch},code=sm_${arch})
  endforeach()
  if(ARG_CUTLASS)
    list(APPEND op_flags -isystem=${MBK_CUTLASS_INCLUDE} --expt-relaxed-constexpr)
  endif()

  if(NOT op_archs)
    mbk_leave_out(${op} "it is for ${ARG_ARCHS}, not for ${mbk_archs}")
  elseif(ARG_CUTLASS AND NOT MBK_CUTLASS_INCLUDE)
    mbk_leave_out(${op} "the headers of nvidia-cutlass were not found")
  else()
    target_sources(mbk_core PRIVATE ${ARG_SOURCES})
    set_source_files_properties(${ARG_SOURCES} PROPERTIES COMPILE_OPTIONS "${op_flags}")
    list(APPEND mbk_ops ${op})
    list(APPEND mbk_bindings ${ARG_BINDING})
  endif()
endmacro()

# The module of all ops added so far, and _C.json, which says what is in it.
function(mbk_finish)
  list(TRANSFORM mbk_ops REPLACE "(.+)" "X(\\1)" OUTPUT_VARIABLE calls)
  list(JOIN calls " " calls)
  file(CONFIGURE OUTPUT generated/ops.h CONTENT "#pragma once\n#define MBK_FOR_EACH_OP(X) @calls@\n" @ONLY)

  pybind11_add_module(_C MODULE NO_EXTRAS python/bindings.cpp ${mbk_bindings})
  target_include_directories(_C PRIVATE ${PROJECT_BINARY_DIR}/generated)
  target_link_libraries(_C PRIVATE mbk_core)
  target_link_options(_C PRIVATE -s)

  list(TRANSFORM mbk_archs PREPEND "\"sm_" OUTPUT_VARIABLE archs)
  list(TRANSFORM archs APPEND "\"")
  list(JOIN archs ", " archs)
  list(TRANSFORM mbk_ops REPLACE "(.+)" "\"\\1\"" OUTPUT_VARIABLE ops)
  list(JOIN ops ", " ops)
  list(JOIN mbk_left_out ", " left_out)
  set(compilers "nvcc ${CMAKE_CUDA_COMPILER_VERSION}, ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
  file(CONFIGURE OUTPUT _C.json @ONLY CONTENT [[{
 "built": true,
 "archs": [@archs@],
 "ptx": "compute_@mbk_ptx@",
 "compilers": "@compilers@",
 "ops": [@ops@],
 "left_out": {@left_out@}
}
]])
endfunction()

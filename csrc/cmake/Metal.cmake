# Adds the Metal backend to the target tq_hb, on Apple's framework or on the simulated one, as TQ_HB_METAL says.
# Sets TQ_HB_METAL_KIND to apple, simulator or nothing.

set(TQ_HB_METAL_KIND ${TQ_HB_METAL})
if(TQ_HB_METAL STREQUAL "off")
  set(TQ_HB_METAL_KIND "")
elseif(TQ_HB_METAL STREQUAL "auto")
  set(TQ_HB_METAL_KIND "")
  if(APPLE)
    set(TQ_HB_METAL_KIND apple)
  endif()
endif()

if(NOT TQ_HB_METAL_KIND)
  return()
elseif(TQ_HB_METAL_KIND STREQUAL "apple")
  if(NOT APPLE)
    message(FATAL_ERROR "TQ_HB_METAL=apple needs macOS; TQ_HB_METAL=simulator runs the same code in tests")
  endif()
elseif(TQ_HB_METAL_KIND STREQUAL "simulator")
  # Of the compilers here only clang knows the Objective-C of Apple's runtime.
  if(NOT CMAKE_OBJCXX_COMPILER AND NOT DEFINED ENV{OBJCXX})
    find_program(TQ_HB_CLANGXX NAMES clang++-19 clang++-21 clang++-20 clang++-18 clang++-17 clang++-16 clang++
      DOC "Compiler of the Metal backend for the simulator")
    if(NOT TQ_HB_CLANGXX)
      message(FATAL_ERROR "TQ_HB_METAL=simulator needs clang 16 or newer; scripts/setup.sh metal-sim installs it")
    endif()
    set(CMAKE_OBJCXX_COMPILER ${TQ_HB_CLANGXX})
  endif()
  if(TQ_HB_SANITIZE AND NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "TQ_HB_SANITIZE with TQ_HB_METAL=simulator needs one compiler for C++ and Objective-C++: "
      "set CMAKE_CXX_COMPILER to clang++ too")
  endif()
else()
  message(FATAL_ERROR "TQ_HB_METAL must be auto, apple, simulator or off, got ${TQ_HB_METAL}")
endif()

enable_language(OBJCXX)
set(CMAKE_OBJCXX_STANDARD 17)
set(CMAKE_OBJCXX_STANDARD_REQUIRED ON)
set(CMAKE_OBJCXX_EXTENSIONS OFF)
if(TQ_HB_METAL_KIND STREQUAL "simulator")
  if(NOT CMAKE_OBJCXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "TQ_HB_METAL=simulator needs clang for Objective-C++, got ${CMAKE_OBJCXX_COMPILER}")
  endif()
  add_subdirectory(tests/metal_sim)
  target_link_libraries(tq_hb PUBLIC metal_sim_frameworks)
  target_compile_definitions(tq_hb PUBLIC TQ_HB_METAL_SIMULATED)
else()
  target_compile_options(tq_hb PRIVATE $<$<COMPILE_LANGUAGE:OBJCXX>:-fobjc-arc>)
  target_link_libraries(tq_hb PUBLIC "-framework Foundation" "-framework Metal")
endif()

# The kernels' source travels inside the library.
file(GLOB metal_kernels CONFIGURE_DEPENDS csrc/metal/kernels/*.metal csrc/metal/kernels/*.h csrc/core/codebooks/*.inc)
set(metal_source ${PROJECT_BINARY_DIR}/kernels.metal)
set(metal_text ${PROJECT_BINARY_DIR}/kernel_source.cpp)
set(embed ${PROJECT_SOURCE_DIR}/csrc/cmake/EmbedText.cmake)
add_custom_command(
  OUTPUT ${metal_source} ${metal_text}
  COMMAND ${CMAKE_COMMAND} -D INPUT=${PROJECT_SOURCE_DIR}/csrc/metal/kernels/tq_hb.metal
    -D ROOT=${PROJECT_SOURCE_DIR}/csrc -D TEXT=${metal_source} -D CXX=${metal_text} -P ${embed}
  DEPENDS ${metal_kernels} csrc/core/abi.h csrc/core/codec_constants.h csrc/core/head_dims.h csrc/core/query_range.h
    ${embed}
  COMMENT "Embedding the Metal kernels"
  VERBATIM)

target_sources(tq_hb PRIVATE
  csrc/metal/bad_rows.mm
  csrc/metal/command_stream.mm
  csrc/metal/context.mm
  csrc/metal/device.mm
  csrc/metal/encoder.mm
  csrc/metal/library.mm
  csrc/metal/pipeline_cache.mm
  csrc/metal/pipeline_key.cpp
  csrc/metal/storage.mm
  ${metal_text})
target_compile_definitions(tq_hb PRIVATE TQ_HB_HAVE_METAL)

if(TQ_HB_METALLIB)
  if(NOT TQ_HB_METAL_KIND STREQUAL "apple")
    message(FATAL_ERROR "TQ_HB_METALLIB needs TQ_HB_METAL=apple")
  endif()
  set(metal_library ${PROJECT_BINARY_DIR}/kernels.metallib)
  set(metal_library_text ${PROJECT_BINARY_DIR}/kernel_library.cpp)
  set(embed_bytes ${PROJECT_SOURCE_DIR}/csrc/cmake/EmbedBytes.cmake)
  add_custom_command(
    OUTPUT ${metal_library_text}
    COMMAND xcrun -sdk macosx metal -std=metal3.0 -mmacosx-version-min=13.0 -fno-fast-math -o ${metal_library}
      ${metal_source}
    COMMAND ${CMAKE_COMMAND} -D INPUT=${metal_library} -D CXX=${metal_library_text} -P ${embed_bytes}
    DEPENDS ${metal_source} ${embed_bytes}
    COMMENT "Compiling the Metal kernels"
    VERBATIM)
  target_sources(tq_hb PRIVATE ${metal_library_text})
  target_compile_definitions(tq_hb PRIVATE TQ_HB_METALLIB)
endif()

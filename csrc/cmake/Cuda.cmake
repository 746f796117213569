# Adds the CUDA backend to the target tq_hb, if TQ_HB_CUDA is on. Its runtime is linked statically, and finds the driver
# when the device is opened.

if(NOT TQ_HB_CUDA)
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # Code for Ampere, Ada and Hopper, and an intermediate form that drivers compile for what comes later.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90)
endif()
enable_language(CUDA)
find_package(CUDAToolkit 12.4 REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)

add_library(tq_hb_cuda_kernels OBJECT
  csrc/cuda/kernels/attend.cu
  csrc/cuda/kernels/attend_group.cu
  csrc/cuda/kernels/attend_group_dk128.cu
  csrc/cuda/kernels/attend_group_dk256.cu
  csrc/cuda/kernels/attend_group_dk512.cu
  csrc/cuda/kernels/codec.cu
  csrc/cuda/kernels/merge.cu)
target_include_directories(tq_hb_cuda_kernels PRIVATE csrc)
target_compile_options(tq_hb_cuda_kernels PRIVATE --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra)
# The codec's bytes are part of the format: see core/codec.h.
set_source_files_properties(csrc/cuda/kernels/codec.cu PROPERTIES COMPILE_OPTIONS -fmad=false)
# This kernel is left empty for GPUs that cannot run it, and then what it calls is unused.
set_source_files_properties(
  csrc/cuda/kernels/attend_group_dk128.cu csrc/cuda/kernels/attend_group_dk256.cu
  csrc/cuda/kernels/attend_group_dk512.cu PROPERTIES COMPILE_OPTIONS -diag-suppress=177)

target_sources(tq_hb PRIVATE
  csrc/cuda/bad_rows.cpp
  csrc/cuda/context.cpp
  csrc/cuda/device.cpp
  csrc/cuda/encoder.cpp
  csrc/cuda/storage.cpp
  $<TARGET_OBJECTS:tq_hb_cuda_kernels>)
target_link_libraries(tq_hb PUBLIC CUDA::cudart_static)
# It is older than the default above, and holds objects of the language.
set_target_properties(tq_hb PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
target_compile_definitions(tq_hb PRIVATE TQ_HB_HAVE_CUDA)

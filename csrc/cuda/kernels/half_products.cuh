// Products of float16 matrices, added in float32, and float32 values cut into float16 and what that leaves.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

namespace tq_hb {
namespace {

__device__ inline std::uint32_t pack_halves(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

__device__ inline float2 unpack_halves(std::uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

/// What float16 leaves of two values, as float16.
__device__ inline std::uint32_t pack_remainders(float a, float b, std::uint32_t halves) {
  const float2 rounded = unpack_halves(halves);
  return pack_halves(a - rounded.x, b - rounded.y);
}

/// One half of a pair, twice.
__device__ inline std::uint32_t first_twice(std::uint32_t pair) {
  return __byte_perm(pair, 0, 0x1010);
}
__device__ inline std::uint32_t second_twice(std::uint32_t pair) {
  return __byte_perm(pair, 0, 0x3232);
}

__device__ inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline std::uint32_t transpose(std::uint32_t matrix) {
  std::uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

/// Selects two of the halves of a and b: the values, or what float16 leaves of them.
__device__ inline std::uint32_t values_of(std::uint32_t a, std::uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ inline std::uint32_t remainders_of(std::uint32_t a, std::uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

}  // namespace
}  // namespace tq_hb

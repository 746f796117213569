// Lanes on two sides of a branch do not meet in one operation.
#include <metal_stdlib>
using namespace metal;

kernel void extremes(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                     ushort i [[thread_index_in_threadgroup]]) {
#if defined(BUG)
  float value;
  if (i % 2 == 0) {
    value = simd_max(in[i]);
  } else {
    value = simd_min(in[i]);  // here
  }
  out[i] = value;
#else
  const float high = simd_max(in[i]), low = simd_min(in[i]);
  out[i] = i % 2 == 0 ? high : low;
#endif
}

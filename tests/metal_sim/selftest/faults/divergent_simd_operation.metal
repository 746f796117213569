// All lanes of a simdgroup take part in its operations.
#include <metal_stdlib>
using namespace metal;

kernel void sum(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                ushort i [[thread_index_in_threadgroup]]) {
  const float value = i % 32 < 7 ? in[i] : 0.0f;
#if defined(BUG)
  if (i % 32 >= 7) return;
#endif
  out[i] = simd_sum(value);  // here
}

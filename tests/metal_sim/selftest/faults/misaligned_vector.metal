// A vector is read at a multiple of its size.
#include <metal_stdlib>
using namespace metal;

kernel void pairs(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  ushort i [[thread_index_in_threadgroup]]) {
#if defined(BUG)
  device const float2* from = (device const float2*)(in + i % 32);
#else
  device const float2* from = (device const float2*)(in + i % 32 * 2);
#endif
  const float2 pair = *from;  // here
  out[i] = pair.x + pair.y;
}

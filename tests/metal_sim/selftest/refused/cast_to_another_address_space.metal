#include <metal_stdlib>
using namespace metal;

kernel void widen(device const float* in [[buffer(0)]], device float* out [[buffer(1)]]) {
#if defined(BUG)
  device const float4* four = (threadgroup const float4*)in;  // refused: cannot initialize
#else
  device const float4* four = (device const float4*)in;
#endif
  out[0] = four[0].x;
}

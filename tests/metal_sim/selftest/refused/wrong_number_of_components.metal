#include <metal_stdlib>
using namespace metal;

kernel void fill(device float* out [[buffer(0)]]) {
#if defined(BUG)
  const float4 four = float4(out[0], out[1], out[2]);  // refused: in instantiation
#else
  const float4 four = float4(out[0], out[1], out[2], out[3]);
#endif
  out[0] = four.w;
}

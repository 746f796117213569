#include <metal_stdlib>
using namespace metal;

#if defined(BUG)
kernel void copy(device const float* in [[buffer(1)]], device float* out [[buffer(1)]]) {  // refused: one slot twice
#else
kernel void copy(device const float* in [[buffer(0)]], device float* out [[buffer(1)]]) {
#endif
  out[0] = in[0];
}

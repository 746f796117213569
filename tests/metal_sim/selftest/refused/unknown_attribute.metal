#include <metal_stdlib>
using namespace metal;

#if defined(BUG)
kernel void fill(device float* out [[buffer(0)]], uint i [[thread_position]]) {  // refused: is not understood
#else
kernel void fill(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
#endif
  out[i] = 1.0f;
}

#include <metal_stdlib>
using namespace metal;

#if defined(BUG)
kernel void fill(device float* out,  // refused: parameter out needs exactly one binding attribute
                 uint i [[thread_position_in_grid]]) {
  out[i] = 1.0f;
}
#else
kernel void fill(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) { out[i] = 1.0f; }
#endif

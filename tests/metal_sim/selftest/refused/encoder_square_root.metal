#include <metal_stdlib>
using namespace metal;

#pragma METAL fp contract(off)

kernel void hadamard_quantize(device float* out [[buffer(0)]]) {
#if defined(BUG)
  out[0] = sqrt(out[1]);  // refused: write precise::sqrt
#else
  out[0] = precise::sqrt(out[1]);
#endif
}

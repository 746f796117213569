#include <metal_stdlib>
using namespace metal;

#pragma METAL fp contract(off)

kernel void hadamard_quantize(device float* out [[buffer(0)]]) {
#if defined(BUG)
  out[0] = out[0] * rsqrt(out[1]);  // refused: rsqrt is not exactly rounded
#else
  out[0] = precise::divide(out[0], precise::sqrt(out[1]));
#endif
}

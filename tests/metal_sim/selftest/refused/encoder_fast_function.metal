#include <metal_stdlib>
using namespace metal;

#pragma METAL fp contract(off)

kernel void hadamard_quantize(device float* out [[buffer(0)]]) {
#if defined(BUG)
  out[0] = fast::exp2(out[1]);  // refused: fast is not exactly rounded
#else
  out[0] = precise::exp2(out[1]);
#endif
}

#include <metal_stdlib>
using namespace metal;

#pragma METAL fp contract(off)

inline float ratio(float a, float b) {
#if defined(BUG)
  return a / b;  // refused: in instantiation
#else
  return precise::divide(a, b);
#endif
}

kernel void hadamard_quantize(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  out[i] = ratio(out[i / 2], 3.0f);
}

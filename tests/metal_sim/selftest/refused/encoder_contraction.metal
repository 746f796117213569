#include <metal_stdlib>
using namespace metal;

inline float moved(float a, float b, float c) {
#if !defined(BUG)
#pragma clang fp contract(off)
#endif
  return a * b + c;  // refused: a sum that no pragma keeps from fusing
}

kernel void hadamard_quantize(device float* out [[buffer(0)]]) { out[0] = moved(out[0], out[1], out[2]); }

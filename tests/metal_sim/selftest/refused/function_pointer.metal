#include <metal_stdlib>
using namespace metal;

inline float twice(float x) { return 2.0f * x; }

kernel void fill(device float* out [[buffer(0)]]) {
#if defined(BUG)
  float (*function)(float) = twice;  // refused: Metal has no function pointers
  out[0] = function(out[0]);
#else
  out[0] = twice(out[0]);
#endif
}

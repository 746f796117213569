#include <metal_stdlib>
using namespace metal;

inline float first(device const float* values) { return values[0]; }

kernel void copy(device const float* in [[buffer(0)]], device float* out [[buffer(1)]]) {
  float own[2] = {1.0f, 2.0f};
#if defined(BUG)
  out[0] = first(own);  // refused: no matching function
#else
  out[0] = first(in) + own[1];
#endif
}

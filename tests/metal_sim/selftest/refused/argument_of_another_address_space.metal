#include <metal_stdlib>
using namespace metal;

inline float first(threadgroup const float* values) { return values[0]; }

kernel void copy(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]]) {
  shared[0] = 1.0f;
#if defined(BUG)
  out[0] = first(out);  // refused: no matching function
#else
  out[0] = first(shared);
#endif
}

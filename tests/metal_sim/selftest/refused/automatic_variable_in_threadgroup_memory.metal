#include <metal_stdlib>
using namespace metal;

#if defined(BUG)
inline float staged(float value) {
  threadgroup float shared[1];  // refused: only kernels declare variables in threadgroup memory
  shared[0] = value;
  return shared[0];
}
#else
inline float staged(float value) { return value; }
#endif

kernel void fill(device float* out [[buffer(0)]]) { out[0] = staged(1.0f); }

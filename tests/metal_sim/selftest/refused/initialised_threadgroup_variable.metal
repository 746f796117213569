#include <metal_stdlib>
using namespace metal;

kernel void fill(device float* out [[buffer(0)]]) {
#if defined(BUG)
  threadgroup float shared = 1.0f;  // refused: not understood
#else
  threadgroup float shared;
  shared = 1.0f;
#endif
  out[0] = shared;
}

#include <metal_stdlib>
using namespace metal;

kernel void fill(device float* out [[buffer(0)]]) {
#if defined(BUG)
  static float value = 1.0f;  // refused: Metal has no static variables in functions
#else
  float value = 1.0f;
#endif
  out[0] = value;
}

#include <metal_stdlib>
using namespace metal;

kernel void fill(device float* out [[buffer(0)]]) {
#if defined(BUG)
  out[0] = float(double(out[1]) * 3);  // refused: Metal has no double
#else
  out[0] = out[1] * 3.0;
#endif
}

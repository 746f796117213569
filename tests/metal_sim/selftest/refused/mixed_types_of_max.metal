#include <metal_stdlib>
using namespace metal;

kernel void fill(device float* out [[buffer(0)]]) {
#if defined(BUG)
  out[0] = max(out[0], 2);  // refused: no matching function
#else
  out[0] = max(out[0], 2.0f);
#endif
}

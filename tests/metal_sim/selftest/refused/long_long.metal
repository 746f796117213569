#include <metal_stdlib>
using namespace metal;

kernel void fill(device ulong* out [[buffer(0)]]) {
#if defined(BUG)
  out[0] = (unsigned long long)(3);  // refused: Metal has no long long
#else
  out[0] = ulong(3);
#endif
}

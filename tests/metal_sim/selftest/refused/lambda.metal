#include <metal_stdlib>
using namespace metal;

kernel void fill(device float* out [[buffer(0)]]) {
#if defined(BUG)
  const auto twice = [](float x) { return 2.0f * x; };  // refused: Metal has no lambdas
  out[0] = twice(out[0]);
#else
  out[0] = 2.0f * out[0];
#endif
}

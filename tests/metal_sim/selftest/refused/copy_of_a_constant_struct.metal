#include <metal_stdlib>
using namespace metal;

struct Arguments {
  uint count;
  float scale;
};

kernel void fill(device float* out [[buffer(0)]], constant Arguments& arguments [[buffer(1)]]) {
#if defined(BUG)
  Arguments copy = arguments;  // refused: no matching constructor
  out[0] = copy.scale;
#else
  out[0] = arguments.scale;
#endif
}

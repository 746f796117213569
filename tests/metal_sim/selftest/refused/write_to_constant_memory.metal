#include <metal_stdlib>
using namespace metal;

struct Arguments {
  uint count;
};

kernel void fill(device float* out [[buffer(0)]], constant Arguments& arguments [[buffer(1)]]) {
#if defined(BUG)
  arguments.count = 3;  // refused: cannot assign
#endif
  out[0] = float(arguments.count);
}

#include <metal_stdlib>
using namespace metal;

#if defined(BUG)
inline uint factorial(uint n) { return n < 2 ? 1 : n * factorial(n - 1); }  // refused: Metal has no recursion
#else
inline uint factorial(uint n) {
  uint product = 1;
  for (uint i = 2; i <= n; ++i) product *= i;
  return product;
}
#endif

kernel void fill(device uint* out [[buffer(0)]]) { out[0] = factorial(5); }

#include <metal_stdlib>
using namespace metal;

inline bool is_odd(uint n);
inline bool is_even(uint n) { return n == 0 || is_odd(n - 1); }
#if defined(BUG)
inline bool is_odd(uint n) { return n != 0 && is_even(n - 1); }  // refused: Metal has no recursion
#else
inline bool is_odd(uint n) { return n % 2 == 1; }
#endif

kernel void fill(device uint* out [[buffer(0)]]) { out[0] = is_even(5) ? 1 : 0; }

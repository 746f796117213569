#include <metal_stdlib>
using namespace metal;

inline float first(device const float* values) { return values[0]; }
#if defined(BUG)
inline float first(threadgroup const float* values) { return values[1]; }  // refused: by address spaces only
#endif

kernel void copy(device float* out [[buffer(0)]]) { out[0] = first(out); }

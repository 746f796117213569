#include <metal_stdlib>
using namespace metal;

kernel void copy(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]],
                 ushort i [[thread_index_in_threadgroup]]) {
  shared[i] = 1.0f;
#if defined(BUG)
  device float* from = shared;  // refused: cannot initialize
#else
  threadgroup float* from = shared;
#endif
  out[i] = from[i];
}

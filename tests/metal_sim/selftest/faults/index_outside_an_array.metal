// A thread's own array has four elements.
#include <metal_stdlib>
using namespace metal;

kernel void gather(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                   ushort i [[thread_index_in_threadgroup]]) {
  float own[4];
  for (int j = 0; j < 4; ++j) own[j] = in[4 * (i % 16) + j];
#if defined(BUG)
  const int at = i % 5;
#else
  const int at = i % 4;
#endif
  out[i] = own[at];  // here
}

// The last thread writes behind the output.
#include <metal_stdlib>
using namespace metal;

kernel void shift(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  ushort i [[thread_index_in_threadgroup]]) {
#if defined(BUG)
  const ushort at = i + 1;
#else
  const ushort at = (i + 1) % 64;
#endif
  out[at] = in[i];  // here
}

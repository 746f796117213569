// The last thread has no neighbour.
#include <metal_stdlib>
using namespace metal;

kernel void difference(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                       ushort i [[thread_index_in_threadgroup]]) {
#if defined(BUG)
  const ushort next = i + 1;
#else
  const ushort next = min(ushort(i + 1), ushort(63));
#endif
  const float neighbour = in[next];  // here
  out[i] = neighbour - in[i];
}

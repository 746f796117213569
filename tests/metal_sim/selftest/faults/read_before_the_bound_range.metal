// What lies before the offset of a binding belongs to somebody else, though it is the same buffer.
#include <metal_stdlib>
using namespace metal;

kernel void difference(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                       ushort i [[thread_index_in_threadgroup]]) {
#if defined(BUG)
  device const float* before = in + i - 1;
#else
  device const float* before = i == 0 ? in : in + i - 1;
#endif
  const float neighbour = *before;  // here
  out[i] = in[i] - neighbour;
}

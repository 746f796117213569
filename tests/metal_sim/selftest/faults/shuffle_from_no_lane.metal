// Lane 31 has no right neighbour.
#include <metal_stdlib>
using namespace metal;

kernel void neighbour(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                      ushort i [[thread_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
#if defined(BUG)
  const ushort from = lane + 1;
#else
  const ushort from = (lane + 1) % 32;
#endif
  out[i] = simd_shuffle(in[i], from);  // here
}

// The distance of a shuffle is the same in all lanes.
#include <metal_stdlib>
using namespace metal;

kernel void neighbour(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                      ushort i [[thread_index_in_threadgroup]]) {
#if defined(BUG)
  const ushort mask = 1 + i % 2;
#else
  const ushort mask = 1;
#endif
  out[i] = simd_shuffle_xor(in[i], mask);  // here
}

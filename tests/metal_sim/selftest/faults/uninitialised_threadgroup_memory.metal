// Nobody writes one of the cells.
#include <metal_stdlib>
using namespace metal;

kernel void reverse(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                    ushort i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
#if defined(BUG)
  if (i != 5)
#endif
    shared[i] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = shared[63 - i];  // here
}

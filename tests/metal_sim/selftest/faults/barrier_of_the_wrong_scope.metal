// A simdgroup barrier orders nothing between simdgroups.
#include <metal_stdlib>
using namespace metal;

kernel void reverse(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                    ushort i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  shared[i] = 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  shared[i] = in[i];
#if defined(BUG)
  simdgroup_barrier(mem_flags::mem_threadgroup);
#else
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  out[i] = shared[63 - i];  // here
}

// A value crosses the lanes of one simdgroup through threadgroup memory.
#include <metal_stdlib>
using namespace metal;

kernel void reverse(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                    threadgroup float* shared [[threadgroup(0)]], ushort i [[thread_index_in_threadgroup]]) {
  shared[i] = 0.0f;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  shared[i] = in[i];
#if !defined(BUG)
  simdgroup_barrier(mem_flags::mem_threadgroup);
#endif
  out[i] = shared[i ^ 31];  // here
}

// All threads of a threadgroup reach its barriers.
#include <metal_stdlib>
using namespace metal;

kernel void shift(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  ushort i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  shared[i] = in[i];
#if defined(BUG)
  if (i >= 40) return;
#endif
  threadgroup_barrier(mem_flags::mem_threadgroup);  // here
  out[i] = shared[(i + 1) % 64];
}

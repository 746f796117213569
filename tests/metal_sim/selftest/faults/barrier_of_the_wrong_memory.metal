// A barrier orders only the kinds of memory that it names.
#include <metal_stdlib>
using namespace metal;

kernel void reverse(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                    ushort i [[thread_index_in_threadgroup]]) {
  out[i] = in[i];
#if defined(BUG)
  threadgroup_barrier(mem_flags::mem_threadgroup);
#else
  threadgroup_barrier(mem_flags::mem_device);
#endif
  const float other = out[63 - i];  // here
  threadgroup_barrier(mem_flags::mem_device);
  out[i] = other;
}

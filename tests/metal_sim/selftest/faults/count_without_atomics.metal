// Threads of several threadgroups count in one cell.
#include <metal_stdlib>
using namespace metal;

kernel void count(device const float* in [[buffer(0)]], device atomic_uint* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  if (in[i % 64] < 0.0f) return;
#if defined(BUG)
  ((device uint*)out)[0] += 1;  // here
#else
  atomic_fetch_add_explicit(out, 1u, memory_order_relaxed);
#endif
}

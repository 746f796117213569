// Threadgroups run in any order: two writers of one cell leave either value.
#include <metal_stdlib>
using namespace metal;

kernel void scatter(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                    uint i [[thread_position_in_grid]]) {
#if defined(BUG)
  const uint at = i / 2 % 64;
#else
  const uint at = i % 64;
#endif
  out[at] = in[i % 64];  // here
}

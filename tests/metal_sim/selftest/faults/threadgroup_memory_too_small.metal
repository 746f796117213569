// The host gives 256 bytes.
#include <metal_stdlib>
using namespace metal;

kernel void stage(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  threadgroup float* shared [[threadgroup(0)]], ushort i [[thread_index_in_threadgroup]]) {
#if defined(BUG)
  threadgroup float* mine = shared + 2 * i;
#else
  threadgroup float* mine = shared + i;
#endif
  *mine = in[i];  // here
  out[i] = *mine;
}

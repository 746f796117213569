// Metal leaves the result of an integer division by zero undefined.
#include <metal_stdlib>
using namespace metal;

kernel void share(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  ushort i [[thread_index_in_threadgroup]]) {
#if defined(BUG)
  const uint parts = i;
#else
  const uint parts = i + 1;
#endif
  out[i] = in[i] + float(64 / parts);  // here
}

#include <metal_stdlib>
using namespace metal;

constant int kCount [[function_constant(0)]];
#if defined(BUG)
constant int kTable[2] = {1, kCount};  // refused: cannot depend on function constants
#else
constant int kTable[2] = {1, 2};
#endif

kernel void fill(device int* out [[buffer(0)]]) { out[0] = kTable[1] + kCount; }

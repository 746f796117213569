#include <metal_stdlib>
using namespace metal;

namespace sizes {
#if defined(BUG)
constexpr uint kRows = 4;  // refused: a variable at program scope must be constant
#else
constant uint kRows = 4;
#endif
}  // namespace sizes

enum : uint { kColumns = 8 };
template <typename T = uint>
inline T area() {
  return sizes::kRows * kColumns;
}

constant uint kMore[] = {1, 2};

kernel void fill(device uint* out [[buffer(0)]]) { out[0] = area<>() + kMore[1]; }

#include <metal_stdlib>
using namespace metal;

struct Shape {
  float side;
#if defined(BUG)
  virtual float area() const { return side * side; }  // refused: Metal has no virtual functions
#else
  float area() const { return side * side; }
#endif
};

kernel void fill(device float* out [[buffer(0)]]) {
  Shape shape;
  shape.side = 2.0f;
  out[0] = shape.area();
}

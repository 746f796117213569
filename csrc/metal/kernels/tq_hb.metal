// Every kernel of the library, in one translation unit.
//
// Kernels trust their arguments: the host has validated the call. Row numbers are 64-bit wherever they
// are multiplied by a row's size.
#include <metal_stdlib>

using namespace metal;

#include "metal/kernels/attend.metal"
#include "metal/kernels/attend_group.metal"
#include "metal/kernels/dequantize.metal"
#include "metal/kernels/fwht.metal"
#include "metal/kernels/merge.metal"
#include "metal/kernels/reduce.metal"

// Last, since it forbids contraction from here to the end of the file.
#include "metal/kernels/encode.metal"

#include "core/codec.h"
#include "cpu/float32_path.h"
#include "cpu/int16_neon.h"
// Its primitives come first.
#include "cpu/int16_path.h"

namespace tq_hb {

const IsaKernel& attend_kernel_neon() noexcept {
  static const IsaKernel kernel{"neon",  rotate_row,   unrotate_row,  attend_in_float32<ScalarDecoder>,
                                nullptr, attend_int16, quantize_query};
  return kernel;
}

}  // namespace tq_hb

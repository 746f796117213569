#include "cpu/float32_neon.h"
#include "cpu/int16_neon.h"
// Their primitives come first.
#include "cpu/float32_lookup.h"
#include "cpu/int16_path.h"
#include "cpu/partials.h"
#include "cpu/query_scale.h"
#include "cpu/rotation.h"

namespace tq_hb {

const IsaKernel& attend_kernel_neon() noexcept {
  static const IsaKernel kernel{
      "neon",       scale_query,      rotate_in_vectors, unrotate_in_vectors, order_columns<kChunk>,
      add_partials, attend_float32,   place_query,       attend_int16,        quantize_query,
      rescore,      Int16Form::kTable};
  return kernel;
}

}  // namespace tq_hb

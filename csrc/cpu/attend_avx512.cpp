#include "cpu/float32_vbmi.h"
#include "cpu/int16_vbmi.h"
// Their primitives come first.
#include "cpu/float32_lookup.h"
#include "cpu/int16_path.h"
#include "cpu/partials.h"
#include "cpu/query_scale.h"
#include "cpu/rotation.h"

namespace tq_hb {

const IsaKernel& attend_kernel_avx512() noexcept {
  static const IsaKernel kernel{
      "avx512",     scale_query,      rotate_in_vectors, unrotate_in_vectors, order_columns<kChunk>,
      add_partials, attend_float32,   place_query,       attend_int16,        quantize_query,
      rescore,      Int16Form::kTable};
  return kernel;
}

}  // namespace tq_hb

#include "cpu/float32_avx2.h"
#include "cpu/int16_avx2.h"
// Their primitives come first.
#include "cpu/float32_lookup.h"
#include "cpu/int16_path.h"
#include "cpu/partials.h"
#include "cpu/query_scale.h"
#include "cpu/rotation.h"

namespace tq_hb {

const IsaKernel& attend_kernel_avx2() noexcept {
  static const IsaKernel kernel{
      "avx2",       scale_query,         rotate_in_vectors, unrotate_in_vectors, order_columns<kChunk>,
      add_partials, attend_float32,      place_query,       attend_int16,        quantize_query,
      rescore,      Int16Form::kSegments};
  return kernel;
}

}  // namespace tq_hb

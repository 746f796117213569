#include "core/codec.h"
#include "cpu/float32_path.h"
#include "cpu/partials.h"
#include "cpu/query_scale.h"

namespace tq_hb {

const IsaKernel& attend_kernel_portable() noexcept {
  static const IsaKernel kernel{"portable",
                                scale_query,
                                rotate_row,
                                unrotate_row,
                                nullptr,
                                add_partials,
                                attend_in_float32<ScalarDecoder>,
                                nullptr,
                                nullptr,
                                nullptr,
                                nullptr,
                                Int16Form::kTable};
  return kernel;
}

}  // namespace tq_hb

#include "core/codec.h"
#include "cpu/encode_kernel.h"

namespace tq_hb {

std::uint32_t encode_rows_portable(const EncodeTask& task) noexcept {
  std::uint32_t refused = 0;
  for (std::size_t i = 0; i < task.rows; ++i) {
    const bool encoded = encode_row(task.src + i * task.head_dim, task.head_dim, task.scale_factor_d512, *task.codebook,
                                    task.codes[i], task.norms[i]);
    if (!encoded) refused |= std::uint32_t{1} << i;
  }
  return refused;
}

}  // namespace tq_hb

// The quantiser's tables: levels, decision boundaries and sign bits.
//
// The tie rule lives here: an index is the number of boundaries strictly below the value, so a value
// on a boundary takes the lower index and NaN takes 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/abi.h"

namespace tq_hb {

enum class CodebookName { kLloydMax = TQ_CODEBOOK_LLOYD_MAX, kMlxNative = TQ_CODEBOOK_MLX_NATIVE };

struct Codebook {
  CodebookName name;
  unsigned cbits;
  const float* levels;      ///< 2^cbits values, ascending
  const float* boundaries;  ///< 2^cbits - 1 values, ascending

  unsigned num_levels() const noexcept { return 1u << cbits; }

  /// Indices of kCount values: binary searches in step with each other, since each alone waits for its loads.
  template <std::size_t kCount>
  void indices_of(const float* values, std::uint8_t* out) const noexcept {
    unsigned index[kCount] = {};
    for (unsigned step = num_levels() / 2; step > 0; step /= 2) {
      for (std::size_t i = 0; i < kCount; ++i) {
        index[i] += static_cast<unsigned>(values[i] > boundaries[index[i] + step - 1]) * step;
      }
    }
    for (std::size_t i = 0; i < kCount; ++i) out[i] = static_cast<std::uint8_t>(index[i]);
  }
};

/// The table for `cbits`, which must be one of bits.h; throws otherwise.
const Codebook& find_codebook(std::string_view op, CodebookName name, unsigned cbits);

/// Names that parse_codebook_name knows, the default first.
std::vector<std::string> codebook_names();

/// Parses "lloyd_max" or "mlx_native".
CodebookName parse_codebook_name(const std::string& op, const std::string& name);

}  // namespace tq_hb

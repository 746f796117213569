#include "core/codebook.h"

#include <array>
#include <utility>

#include "core/bits.h"
#include "core/codec_constants.h"
#include "core/error.h"
#include "core/layout.h"

namespace tq_hb {
namespace {

constexpr float kLloydMax5Levels[] = {
#include "core/codebooks/lloyd_max_5_levels.inc"
};
constexpr float kLloydMax5Boundaries[] = {
#include "core/codebooks/lloyd_max_5_boundaries.inc"
};
constexpr float kLloydMax6Levels[] = {
#include "core/codebooks/lloyd_max_6_levels.inc"
};
constexpr float kLloydMax6Boundaries[] = {
#include "core/codebooks/lloyd_max_6_boundaries.inc"
};
constexpr float kLloydMax8Levels[] = {
#include "core/codebooks/lloyd_max_8_levels.inc"
};
constexpr float kLloydMax8Boundaries[] = {
#include "core/codebooks/lloyd_max_8_boundaries.inc"
};
constexpr float kMlxNative5Levels[] = {
#include "core/codebooks/mlx_native_5_levels.inc"
};
constexpr float kMlxNative5Boundaries[] = {
#include "core/codebooks/mlx_native_5_boundaries.inc"
};
constexpr float kMlxNative6Levels[] = {
#include "core/codebooks/mlx_native_6_levels.inc"
};
constexpr float kMlxNative6Boundaries[] = {
#include "core/codebooks/mlx_native_6_boundaries.inc"
};
constexpr float kMlxNative8Levels[] = {
#include "core/codebooks/mlx_native_8_levels.inc"
};
constexpr float kMlxNative8Boundaries[] = {
#include "core/codebooks/mlx_native_8_boundaries.inc"
};

template <std::size_t kLevels, std::size_t kBoundaries>
constexpr Codebook make(CodebookName name, unsigned cbits, const float (&levels)[kLevels],
                        const float (&boundaries)[kBoundaries]) {
  static_assert(kBoundaries + 1 == kLevels, "a table has one boundary fewer than levels");
  return kLevels == std::size_t{1} << cbits ? Codebook{name, cbits, levels, boundaries} : throw "wrong table size";
}

constexpr Codebook kCodebooks[] = {
#define TQ_CODEBOOKS(cbits)                                                                     \
  make(CodebookName::kLloydMax, cbits, kLloydMax##cbits##Levels, kLloydMax##cbits##Boundaries), \
      make(CodebookName::kMlxNative, cbits, kMlxNative##cbits##Levels, kMlxNative##cbits##Boundaries),
    TQ_HB_FOR_EACH_CBITS(TQ_CODEBOOKS)
#undef TQ_CODEBOOKS
};

constexpr std::pair<CodebookName, const char*> kNames[] = {{CodebookName::kLloydMax, "lloyd_max"},
                                                           {CodebookName::kMlxNative, "mlx_native"}};

constexpr std::uint8_t kSignBits[] = {
#include "core/codebooks/signs.inc"
};
static_assert(8 * sizeof(kSignBits) == kMaxHeadDim, "one bit per coordinate");

std::array<float, kMaxHeadDim> expand_signs() {
  std::array<float, kMaxHeadDim> signs{};
  for (std::size_t j = 0; j < kMaxHeadDim; ++j) signs[j] = (kSignBits[j / 8] >> (j % 8)) & 1 ? -1.0f : 1.0f;
  return signs;
}

}  // namespace

const Codebook& find_codebook(std::string_view op, CodebookName name, unsigned cbits) {
  for (const Codebook& codebook : kCodebooks) {
    if (codebook.name == name && codebook.cbits == cbits) return codebook;
  }
  throw invalid(std::string(op), "codebook_bits", "must be 5, 6 or 8", cbits);
}

std::vector<std::string> codebook_names() {
  std::vector<std::string> names;
  for (const auto& [name, text] : kNames) names.emplace_back(text);
  return names;
}

CodebookName parse_codebook_name(const std::string& op, const std::string& name) {
  std::string known;
  for (const auto& [value, text] : kNames) {
    if (name == text) return value;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  throw invalid(op, "codebook", "must be one of " + known, '"' + name + '"');
}

const float* sign_table() noexcept {
  static const std::array<float, kMaxHeadDim> signs = expand_signs();
  return signs.data();
}

}  // namespace tq_hb

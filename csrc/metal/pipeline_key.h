// What a pipeline is made for: everything that changes its code. What varies per call is in the args structs.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace tq_hb {

enum class Kernel {
  kFwhtPremult,
  kFwhtUndo,
  kFwhtPlain,
  kQuantize,
  kQuantizeDual,
  kDequantize,
  kAttend,
  kReduce,
  kReduceUndo,
  kGroup2,
  kGroup4,
  kGroup8,
  kMerge,
  kMergeUndo,
};

struct PipelineKey {
  Kernel kernel;
  unsigned head_dim;     ///< 0 where one kernel serves all sizes
  unsigned k_cbits = 0;  ///< also the only tensor's; 0 for kernels that see no codes
  unsigned v_cbits = 0;
  bool direct = false;  ///< attention that writes the output itself
  bool plane = false;   ///< codes of 5 and 6 bits lie in planes

  bool operator==(const PipelineKey& other) const noexcept {
    return kernel == other.kernel && head_dim == other.head_dim && k_cbits == other.k_cbits &&
           v_cbits == other.v_cbits && direct == other.direct && plane == other.plane;
  }
};

struct PipelineKeyHash {
  std::size_t operator()(const PipelineKey& key) const noexcept;
};

/// The kernel function's name in the library.
std::string kernel_name(const PipelineKey& key);

/// The most threads per threadgroup that the kernel is ever launched with.
unsigned max_threads(const PipelineKey& key) noexcept;

/// Every pipeline that ops at these widths can need.
std::vector<PipelineKey> all_pipelines(const std::vector<unsigned>& cbits);

}  // namespace tq_hb

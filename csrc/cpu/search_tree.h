// Codebooks as search trees, for the encoders that look boundaries up in registers.
#pragma once

#include "core/codebook.h"
#include "cpu/encode_kernel.h"

namespace tq_hb {

/// The codebook's boundaries; made at the first call.
const SearchTree& search_tree(const Codebook& codebook);

}  // namespace tq_hb

// Which instruction sets this build has kernels for and this processor runs.
#pragma once

#include <string>
#include <vector>

#include "cpu/attend_kernel.h"
#include "cpu/encode_kernel.h"

namespace tq_hb {

/// Those this processor runs, slowest first.
std::vector<const IsaKernel*> available_kernels();

/// The kernels that ops run with: the fastest, unless another was set.
const IsaKernel& attend_kernel();
/// The encoder of the same instruction set.
EncodeRows& encode_kernel();

/// Whether this processor is better off with upcoming codes in its first cache level, where few rows share them: see
/// docs/cpu.md, section 2.
bool prefers_first_level() noexcept;

/// Has later ops run with the named kernels. A name that is not available is an error that lists those that are.
void set_attend_kernel(const std::string& op, const std::string& field, const std::string& name);

}  // namespace tq_hb

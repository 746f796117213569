// Attention on the cpu: prepares the queries, splits the keys, merges and un-rotates.
#pragma once

#include "core/device.h"
#include "cpu/attend_kernel.h"
#include "cpu/bad_rows.h"
#include "cpu/thread_pool.h"

namespace tq_hb {

/// The class of accuracy that the op is served with.
Precision attend_precision(const AttendOp& op, const IsaKernel& kernel) noexcept;

/// Runs a validated op. A row of q that is not finite, or whose score bias is not, is reported and its results are left
/// alone.
void attend(const AttendOp& op, ThreadPool& pool, BadRows& bad_rows);

}  // namespace tq_hb

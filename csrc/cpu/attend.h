// Decode attention on the cpu: prepares the queries, splits the keys, merges and un-rotates.
#pragma once

#include "core/device.h"
#include "cpu/bad_rows.h"
#include "cpu/thread_pool.h"

namespace tq_hb {

/// Runs a validated op. The output row of a query that is not finite is left alone and reported.
void attend(const AttendOp& op, ThreadPool& pool, BadRows& bad_rows);

}  // namespace tq_hb

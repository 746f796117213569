// The codec's ops on the cpu: encode, decode and rotation over many rows.
#pragma once

#include "core/device.h"
#include "cpu/bad_rows.h"
#include "cpu/thread_pool.h"

namespace tq_hb {

/// Runs a validated op on one of its targets. A row that cannot be encoded leaves its slot alone and is reported.
void quantize(const QuantizeOp& op, const QuantizeTarget& target, ThreadPool& pool, BadRows& bad_rows);
void dequantize(const DequantizeOp& op, ThreadPool& pool);
void fwht(const FwhtOp& op, ThreadPool& pool);

}  // namespace tq_hb

#include "core/encoder.h"

#include <algorithm>
#include <utility>

#include "core/device.h"
#include "core/params.h"

namespace tq_hb {
namespace {

TqU32 abi_value(const Codebook* codebook) {
  return static_cast<TqU32>(codebook->name);
}

/// Fills in the planned fields that follow from the rest of a checked call.
void complete(QuantizeOp& op) {
  op.args.codebook = abi_value(op.targets.front().codebook);
}
void complete(DequantizeOp& op) {
  op.args.codebook = abi_value(op.codebook);
}
void complete(AttendOp& op) {
  op.args.codebook = abi_value(op.k_codebook);
  op.args.num_queries = static_cast<TqU32>(op.num_queries());
  op.args.query_position = op.query_position ? *op.query_position : op.args.kv_seq_len - 1;
  op.args.flags = (op.sinks ? TQ_HAS_SINKS : 0) | (op.score_bias ? TQ_HAS_SCORE_BIAS : 0) | (op.lse ? TQ_HAS_LSE : 0);
}
void complete(FwhtOp&) {}

}  // namespace

std::unique_lock<std::mutex> CommandEncoder::enter(const std::string& op) const {
  device_->check_usable(op);
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock) throw Error(ErrorCode::kDevice, op + ": the encoder is in use by another thread");
  return lock;
}

void CommandEncoder::require_recording(const std::string& op) const {
  if (state_ != State::kRecording) {
    throw Error(ErrorCode::kDevice, op + ": the encoder has been committed; make a new one with Device.encoder()");
  }
}

template <class Op>
void CommandEncoder::record(Op op) {
  const auto lock = enter(op.name);
  require_recording(op.name);
  validate(op, device_);
  complete(op);
  if (!auto_barrier_) {
    encode(std::move(op));
    return;
  }
  const Op kept = op;  // holds the buffers that `accesses` points to
  const Accesses accesses = accesses_of(kept);
  if (pending_.conflicts(accesses)) barrier();
  encode(std::move(op));
  // Last, since an op that has a barrier inside reads and writes beyond it, too.
  pending_.add(accesses);
}

void CommandEncoder::barrier() {
  encode_barrier();
  pending_.clear();
  note({NodeKind::kBarrier, "", {}, {}});
}

void CommandEncoder::hadamard_quantize(QuantizeOp op) {
  record(std::move(op));
}
void CommandEncoder::dequantize(DequantizeOp op) {
  record(std::move(op));
}
void CommandEncoder::flash_attn_vec(AttendOp op) {
  record(std::move(op));
}
void CommandEncoder::fwht(FwhtOp op) {
  record(std::move(op));
}

void CommandEncoder::memory_barrier() {
  const auto lock = enter("memory_barrier");
  require_recording("memory_barrier");
  barrier();
}

void CommandEncoder::commit() {
  const auto lock = enter("commit");
  require_recording("commit");
  state_ = State::kCommitted;
  submit();
}

void CommandEncoder::wait() {
  const auto lock = enter("wait");
  if (state_ == State::kRecording) {
    throw Error(ErrorCode::kDevice, "wait: the encoder has not been committed; call commit() first");
  }
  if (state_ == State::kCommitted) {
    state_ = State::kFinished;
    try {
      gpu_time_ = finish();
    } catch (...) {
      failure_ = std::current_exception();
    }
  }
  if (failure_ != nullptr) std::rethrow_exception(failure_);
}

bool CommandEncoder::is_done() const {
  const auto lock = enter("is_done");
  return state_ == State::kFinished || (state_ == State::kCommitted && has_finished());
}

double CommandEncoder::gpu_time() const {
  const auto lock = enter("gpu_time");
  if (state_ != State::kFinished) {
    throw Error(ErrorCode::kDevice, "gpu_time: is known only after wait()");
  }
  return gpu_time_;
}

std::vector<Node> CommandEncoder::nodes(std::size_t skipped) const {
  const auto lock = enter("nodes");
  return {nodes_.begin() + static_cast<std::ptrdiff_t>(std::min(skipped, nodes_.size())), nodes_.end()};
}

std::size_t CommandEncoder::num_nodes() const {
  const auto lock = enter("num_nodes");
  return nodes_.size();
}

std::vector<std::string> CommandEncoder::kernels() const {
  const auto lock = enter("kernels");
  std::vector<std::string> names;
  for (const Node& node : nodes_) {
    if (node.kind != NodeKind::kBarrier) names.push_back(node.kernel);
  }
  return names;
}

Precision CommandEncoder::precision() const {
  const auto lock = enter("precision");
  return precision_;
}

}  // namespace tq_hb

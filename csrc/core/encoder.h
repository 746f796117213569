// CommandEncoder: records ops, then runs them.
//
// The public methods check the call completely before the backend sees it, so a backend trusts its
// arguments. Ops run in the order in which memory barriers separate them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/hazards.h"
#include "core/ops.h"

namespace tq_hb {

struct Size3 {
  std::uint64_t width = 0, height = 0, depth = 0;
};

enum class NodeKind { kSdpa, kOther, kBarrier };

/// One thing that was encoded: a kernel's launch or a barrier. Backends without launches leave the sizes 0.
struct Node {
  NodeKind kind;
  std::string kernel;
  Size3 threadgroups, threads;
  std::uint64_t threadgroup_bytes = 0;
};

/// Belongs to one thread at a time; a call from another one meanwhile throws.
class CommandEncoder {
 public:
  /// With `auto_barrier`, a barrier is placed before each op that needs one.
  explicit CommandEncoder(const Device* device, bool auto_barrier = false)
      : device_(device), auto_barrier_(auto_barrier) {}
  virtual ~CommandEncoder() = default;
  CommandEncoder(const CommandEncoder&) = delete;
  CommandEncoder& operator=(const CommandEncoder&) = delete;

  void hadamard_quantize(QuantizeOp op);
  void dequantize(DequantizeOp op);
  void flash_attn_vec(AttendOp op);
  void fwht(FwhtOp op);
  void memory_barrier();

  void commit();
  /// Blocks until the committed ops are done; throws what went wrong in them, every time it is called.
  void wait();
  /// Whether the committed ops are done, so that wait() will not block.
  bool is_done() const;
  /// Seconds the device spent on the ops; only after wait().
  double gpu_time() const;
  /// What has been encoded so far, barriers included, in order, without the first `skipped`.
  std::vector<Node> nodes(std::size_t skipped = 0) const;
  std::size_t num_nodes() const;
  /// Names of the kernels encoded so far.
  std::vector<std::string> kernels() const;
  /// The class of accuracy that all attention encoded so far keeps to.
  Precision precision() const;

 protected:
  void note(Node node) { nodes_.push_back(std::move(node)); }
  const std::vector<Node>& noted() const noexcept { return nodes_; }
  /// Notes that attention was encoded which is not strict.
  void note_default_precision() noexcept { precision_ = Precision::kDefault; }
  /// Encodes a barrier; also for backends that need one within an op.
  void barrier();

 private:
  virtual void encode(QuantizeOp op) = 0;
  virtual void encode(DequantizeOp op) = 0;
  virtual void encode(AttendOp op) = 0;
  virtual void encode(FwhtOp op) = 0;
  virtual void encode_barrier() = 0;
  virtual void submit() = 0;
  /// Waits for the submitted ops and returns their time; throws their error.
  virtual double finish() = 0;
  /// Whether finish() would not wait.
  virtual bool has_finished() const { return true; }

  /// Locks an encoder that no other thread is inside of; throws otherwise, since waiting here could deadlock.
  std::unique_lock<std::mutex> enter(const std::string& op) const;
  void require_recording(const std::string& op) const;
  template <class Op>
  void record(Op op);

  enum class State { kRecording, kCommitted, kFinished };
  const Device* device_;
  bool auto_barrier_;
  mutable std::mutex mutex_;  // held by commit and wait for as long as they take
  State state_ = State::kRecording;
  std::vector<Node> nodes_;
  Precision precision_ = Precision::kStrict;
  HazardTracker pending_;
  std::exception_ptr failure_;
  double gpu_time_ = 0.0;
};

}  // namespace tq_hb

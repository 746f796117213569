// The three nouns every backend implements: Device, Buffer and CommandEncoder.
//
// The encoder's public methods check the call completely before the backend sees it, so a backend
// trusts its arguments. Ops run in the order in which memory barriers separate them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/abi.h"
#include "core/codebook.h"
#include "core/error.h"

namespace tq_hb {

enum class DType { kFloat32, kFloat16, kUint8, kUint16, kUint32, kInt32 };

std::size_t size_of(DType dtype) noexcept;
const char* name_of(DType dtype) noexcept;

using Shape = std::vector<std::uint64_t>;

std::string to_string(const Shape& shape);

class Device;

/// One allocation of a device. `host()` is its address where the host can reach it.
class Storage {
 public:
  Storage(const Device* device, std::byte* host, std::uint64_t size) : device_(device), host_(host), size_(size) {}
  virtual ~Storage() = default;
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  const Device* device() const noexcept { return device_; }
  std::byte* host() const noexcept { return host_; }
  std::uint64_t size() const noexcept { return size_; }

 private:
  const Device* device_;
  std::byte* host_;
  std::uint64_t size_;
};

/// A C-contiguous array in a Storage. Copies and slices share the storage.
class Buffer {
 public:
  Buffer() = default;
  /// Throws if the array does not fit in the storage or is misaligned.
  Buffer(std::shared_ptr<Storage> storage, DType dtype, Shape shape, std::uint64_t offset = 0);

  DType dtype() const noexcept { return dtype_; }
  const Shape& shape() const noexcept { return shape_; }
  std::uint64_t offset() const noexcept { return offset_; }
  std::uint64_t nbytes() const noexcept { return nbytes_; }
  std::uint64_t size() const noexcept { return nbytes_ / size_of(dtype_); }
  const std::shared_ptr<Storage>& storage() const noexcept { return storage_; }
  const Device* device() const noexcept { return storage_->device(); }

  std::byte* host() const noexcept { return storage_->host() + offset_; }
  template <class T>
  T* data() const noexcept {
    return reinterpret_cast<T*>(host());
  }

  /// Rows [start, stop) of the first axis.
  Buffer slice(std::uint64_t start, std::uint64_t stop) const;
  /// Row `index` of the first axis, with that axis removed.
  Buffer row(std::uint64_t index) const;
  bool overlaps(const Buffer& other) const noexcept;

 private:
  std::shared_ptr<Storage> storage_;
  DType dtype_ = DType::kUint8;
  Shape shape_;
  std::uint64_t offset_ = 0;
  std::uint64_t nbytes_ = 0;
};

/// One tensor of the cache and the rows that go into it.
struct QuantizeTarget {
  Buffer src;     ///< float32 (G, D) or (T, G, D)
  Buffer packed;  ///< uint8 (G, capacity, D)
  Buffer norms;   ///< float32 (G, capacity) or (G, capacity, 2)
  const Codebook* codebook = nullptr;
  std::string key;  ///< "" for a single tensor, "k" or "v" for a pair: part of the names in messages

  std::string src_name() const { return key.empty() ? "src" : "src_" + key; }
  std::string packed_name() const { return key.empty() ? "packed" : key + "_packed"; }
  std::string norms_name() const { return key.empty() ? "norms" : key + "_norms"; }
};

/// Encodes one tensor, or K and V together.
struct QuantizeOp {
  std::string name;
  TqHadamardQuantizeArgs args;
  std::vector<QuantizeTarget> targets;
};

/// Rebuilds consecutive positions from `first_position` on, still rotated.
struct DequantizeOp {
  std::string name;
  TqHadamardQuantizeArgs args;
  std::uint64_t first_position;
  Buffer packed;
  Buffer norms;
  Buffer output;  ///< float32 (G, D) for one position or (T, G, D)
  const Codebook* codebook = nullptr;
};

struct AttendOp {
  std::string name;
  TqFlashAttnVecArgs args;
  Buffer q;  ///< float32 (H, D) or (1, H, D)
  Buffer k_packed, k_norms, v_packed, v_norms;
  Buffer output;              ///< float32, q's shape
  std::optional<Buffer> tmp;  ///< float32, at least tmp_buffer_bytes; the encoder brings its own otherwise
  const Codebook* k_codebook = nullptr;
  const Codebook* v_codebook = nullptr;
  bool fused_undo = false;
};

enum class Fwht { kPremult, kUndo };

struct FwhtOp {
  std::string name;
  Fwht kind;
  Buffer data;  ///< float32 (..., D), transformed in place
};

/// Records ops, then runs them. Belongs to one thread at a time; a call from another one meanwhile throws.
class CommandEncoder {
 public:
  explicit CommandEncoder(const Device* device) : device_(device) {}
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
  /// Seconds the device spent on the ops; only after wait().
  double gpu_time() const;
  /// Names of the kernels recorded so far.
  std::vector<std::string> kernels() const;

 protected:
  void note_kernel(std::string name) { kernels_.push_back(std::move(name)); }

 private:
  virtual void encode(QuantizeOp op) = 0;
  virtual void encode(DequantizeOp op) = 0;
  virtual void encode(AttendOp op) = 0;
  virtual void encode(FwhtOp op) = 0;
  virtual void encode_barrier() = 0;
  virtual void submit() = 0;
  /// Waits for the submitted ops and returns their time; throws their error.
  virtual double finish() = 0;

  /// Locks an encoder that no other thread is inside of; throws otherwise, since waiting here could deadlock.
  std::unique_lock<std::mutex> enter(const std::string& op) const;
  void require_recording(const std::string& op) const;
  template <class Op>
  void record(Op op);

  enum class State { kRecording, kCommitted, kFinished };
  const Device* device_;
  mutable std::mutex mutex_;  // held by commit and wait for as long as they take
  State state_ = State::kRecording;
  std::vector<std::string> kernels_;
  std::optional<Error> failure_;
  double gpu_time_ = 0.0;
};

struct DeviceLimits {
  std::uint64_t max_buffer_bytes;
  unsigned num_threads;
};

class Device {
 public:
  virtual ~Device() = default;

  virtual std::string name() const = 0;
  virtual std::string backend() const = 0;
  virtual bool is_simulated() const { return false; }
  virtual DeviceLimits limits() const = 0;

  /// Zeroed memory.
  Buffer empty(DType dtype, Shape shape) const;
  /// Memory of the host's, used in place and kept alive by `owner`; null where the device would have to copy.
  virtual std::shared_ptr<Storage> wrap_host(std::byte* data, std::uint64_t size,
                                             std::shared_ptr<void> owner) const = 0;
  virtual std::unique_ptr<CommandEncoder> make_encoder() const = 0;

 private:
  virtual std::shared_ptr<Storage> allocate(std::uint64_t size) const = 0;
};

}  // namespace tq_hb

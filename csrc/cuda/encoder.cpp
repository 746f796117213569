// Records launches, and makes them at commit in the order of one stream: a barrier has nothing left to do.

#include "cuda/encoder.h"

#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/device.h"
#include "core/layout.h"
#include "core/params.h"
#include "cuda/bad_rows.h"
#include "cuda/kernels/kernels.h"
#include "cuda/storage.h"

namespace tq_hb {
namespace {

void check_aligned(const std::string& op, const std::string& field, const Buffer& rows,
                   std::uintptr_t alignment = kRowAlignment) {
  if (rows.address() % alignment == 0) return;
  throw invalid(op, field, "must start at a multiple of " + std::to_string(alignment) + " bytes",
                "address " + std::to_string(rows.address()));
}

/// A launch has so many blocks at most, and kernels count rows in 32 bits.
TqU32 checked_rows(const std::string& op, std::uint64_t rows) {
  if (rows > static_cast<std::uint64_t>(std::numeric_limits<std::int32_t>::max())) {
    throw unsupported(op, std::to_string(rows) + " rows in one call");
  }
  return static_cast<TqU32>(rows);
}

unsigned high_bits(Packing packing, unsigned cbits) {
  return has_planes(packing, cbits) ? cbits - kNibbleBits : 0;
}

CacheSide cache_side(const Buffer& packed, const Buffer& norms, const Codebook& codebook, Packing packing) {
  return {device_data<const std::uint8_t>(packed), device_data<const float>(norms), codebook.cbits,
          high_bits(packing, codebook.cbits)};
}

std::string with_head_dim(const std::string& kernel, std::uint64_t head_dim) {
  return kernel + std::to_string(head_dim);
}

Transform transform_of(Fwht kind) {
  switch (kind) {
    case Fwht::kPremult:
      return Transform::kRotate;
    case Fwht::kUndo:
      return Transform::kUnrotate;
    case Fwht::kPlain:
      break;
  }
  return Transform::kPlain;
}

/// A pair of events around the launches, if the stream is not being captured into a graph.
class Stopwatch {
 public:
  ~Stopwatch() {
    for (const cudaEvent_t event : {start_, stop_}) {
      if (event != nullptr) static_cast<void>(cudaEventDestroy(event));
    }
  }
  void start(cudaStream_t stream) {
    for (cudaEvent_t* event : {&start_, &stop_}) check_cuda(cudaEventCreate(event), "cuda: making an event");
    check_cuda(cudaEventRecord(start_, stream), "cuda: recording an event");
  }
  void stop(cudaStream_t stream) {
    if (stop_ != nullptr) check_cuda(cudaEventRecord(stop_, stream), "cuda: recording an event");
  }
  bool has_stopped() const {
    const cudaError_t result = stop_ == nullptr ? cudaSuccess : cudaEventQuery(stop_);
    if (result != cudaErrorNotReady) check_cuda(result, "cuda: asking for an event");
    return result == cudaSuccess;
  }
  /// Seconds; both events must have come.
  double seconds() const {
    if (stop_ == nullptr) return 0.0;
    float milliseconds = 0.0f;
    check_cuda(cudaEventElapsedTime(&milliseconds, start_, stop_), "cuda: reading events");
    return 1e-3 * static_cast<double>(milliseconds);
  }
  /// In a forked child no call may reach CUDA.
  void abandon() noexcept { start_ = stop_ = nullptr; }

 private:
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
};

/// Memory that is taken and given back in the order of a stream.
class StreamMemory {
 public:
  StreamMemory(std::uint64_t bytes, cudaStream_t stream, const std::string& what) : stream_(stream) {
    check_cuda(cudaMallocAsync(&data_, bytes, stream), what);
  }
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;
  /// What goes wrong is found as the last error.
  ~StreamMemory() { static_cast<void>(cudaFreeAsync(data_, stream_)); }
  void* data() const noexcept { return data_; }

 private:
  cudaStream_t stream_;
  void* data_ = nullptr;
};

/// An attention's launches, and the partial results between them if the caller brings no memory for these.
struct Attention {
  AttendCall call;
  std::unique_ptr<StreamMemory> partials;
};

class CudaEncoder final : public CommandEncoder {
 public:
  CudaEncoder(const Device* device, const std::shared_ptr<CudaContext>& context, cudaStream_t stream, bool auto_barrier)
      : CommandEncoder(device, auto_barrier), context_(context), stream_(stream), bad_rows_(context) {}

  ~CudaEncoder() override {
    if (context_->is_forked()) {
      stopwatch_.abandon();
    } else if (is_running_ && cudaStreamSynchronize(stream_) != cudaSuccess) {
      // What the launches use may not go away before they are done; an error of theirs is not the next encoder's.
      static_cast<void>(cudaGetLastError());
    }
  }

 private:
  using LaunchOn = std::function<void(cudaStream_t)>;

  void record(NodeKind kind, std::string kernel, const Launch& sizes, LaunchOn launch_on) {
    launches_.push_back({kernel, std::move(launch_on)});
    note({kind,
          std::move(kernel),
          {sizes.grid.x, sizes.grid.y, sizes.grid.z},
          {sizes.block.x, sizes.block.y, sizes.block.z},
          sizes.shared_bytes});
  }

  void hold(std::initializer_list<const Buffer*> buffers) {
    for (const Buffer* buffer : buffers) storages_.push_back(buffer->storage());
  }

  void encode(QuantizeOp op) override {
    for (const QuantizeTarget& target : op.targets) {
      check_aligned(op.name, target.src_name(), target.src);
      check_aligned(op.name, target.packed_name(), target.packed, kCodesAlignment);
    }
    const std::uint64_t tokens = op.num_tokens();
    const std::uint64_t skipped = op.num_skipped();
    checked_rows(op.name, tokens * op.args.num_kv_heads);
    if (tokens == 0) return;
    QuantizeCall call{};
    call.args = op.args;
    call.first_token = static_cast<TqU32>(skipped);
    call.tokens = static_cast<TqU32>(tokens - skipped);
    for (const QuantizeTarget& target : op.targets) {
      const unsigned cbits = target.codebook->cbits;
      call.tensors[call.num_tensors++] = {
          device_data<const float>(target.src),
          device_data<std::uint8_t>(target.packed),
          device_data<float>(target.norms),
          bad_rows_.watch(op.name, target.src_name(), RowRule::kEncodable, op.args.num_kv_heads),
          cbits,
          high_bits(op.packing, cbits)};
      hold({&target.src, &target.packed, &target.norms});
    }
    const char* kernel = op.targets.size() == 1 ? "hadamard_quantize_kv_hb_d" : "hadamard_quantize_kv_hb_dual_d";
    record(NodeKind::kOther, with_head_dim(kernel, op.args.head_dim), quantize_launch(call),
           [call](cudaStream_t stream) { launch(call, stream); });
  }

  void encode(DequantizeOp op) override {
    check_aligned(op.name, "packed", op.packed, kCodesAlignment);
    check_aligned(op.name, "output", op.output);
    checked_rows(op.name, op.num_tokens() * op.args.num_kv_heads);
    if (op.num_tokens() == 0) return;
    DequantizeCall call{};
    call.args = op.args;
    call.first_slot = static_cast<TqU32>(op.first_position % op.args.cache_capacity);
    call.tokens = static_cast<TqU32>(op.num_tokens());
    call.packed = device_data<const std::uint8_t>(op.packed);
    call.norms = device_data<const float>(op.norms);
    call.output = device_data<float>(op.output);
    call.cbits = op.codebook->cbits;
    call.high_bits = high_bits(op.packing, op.codebook->cbits);
    hold({&op.packed, &op.norms, &op.output});
    record(NodeKind::kOther, "tq_dequantize_hb_kv", dequantize_launch(call),
           [call](cudaStream_t stream) { launch(call, stream); });
  }

  void encode(AttendOp op) override {
    check_aligned(op.name, "q", op.q);
    const bool is_group = op.kernel == AttendKernel::kGroup;
    const std::uintptr_t codes_alignment = is_group ? kRowAlignment : kCodesAlignment;
    check_aligned(op.name, "k_packed", op.k_packed, codes_alignment);
    check_aligned(op.name, "v_packed", op.v_packed, codes_alignment);
    check_aligned(op.name, "output", op.output);
    if (op.tmp) check_aligned(op.name, "tmp", *op.tmp);
    const TqFlashAttnVecArgs& args = op.args;
    checked_rows(op.name, std::uint64_t{args.num_queries} * args.num_heads);
    AttendCall call{};
    call.args = args;
    call.q = device_data<const float>(op.q);
    call.k = cache_side(op.k_packed, op.k_norms, *op.k_codebook, op.packing);
    call.v = cache_side(op.v_packed, op.v_norms, *op.v_codebook, op.packing);
    call.partials = op.tmp ? device_data<float>(*op.tmp) : nullptr;
    call.output = device_data<float>(op.output);
    call.unrotate = op.fused_undo;
    call.is_group = is_group;
    call.head_tile = op.head_tile;
    hold({&op.q, &op.k_packed, &op.k_norms, &op.v_packed, &op.v_norms, &op.output});
    if (op.tmp) hold({&*op.tmp});
    if (op.score_bias) {
      call.score_bias = device_data<const float>(*op.score_bias);
      hold({&*op.score_bias});
    }
    if (op.sinks) {
      call.sinks = device_data<const float>(*op.sinks);
      hold({&*op.sinks});
    }
    if (op.lse) {
      call.lse = device_data<float>(*op.lse);
      hold({&*op.lse});
    }
    call.status = bad_rows_.watch(op.name, "q", RowRule::kFinite, args.num_heads);

    // Memory for partial results is taken when the launches are made; if one fails, what holds them gives it back.
    const auto attention = std::make_shared<Attention>(Attention{call, nullptr});
    const std::uint64_t own_bytes =
        op.tmp ? 0 : tmp_buffer_bytes(args.num_heads, args.head_dim, args.num_queries, args.nwg);
    const std::string attend = is_group ? "flash_attn_vec_tq_hb_gqa" + std::to_string(op.head_tile) + "_dk"
                                        : std::string("flash_attn_vec_tq_hb_dk");
    record(NodeKind::kSdpa, with_head_dim(attend, args.head_dim),
           is_group ? attend_group_launch(call) : attend_launch(call), [attention, own_bytes](cudaStream_t stream) {
             AttendCall& launched = attention->call;
             if (own_bytes > 0) {
               attention->partials =
                   std::make_unique<StreamMemory>(own_bytes, stream, "cuda: allocating partial results");
               launched.partials = static_cast<float*>(attention->partials->data());
             }
             if (launched.is_group) {
               launch_attend_group(launched, stream);
             } else {
               launch_attend(launched, stream);
             }
           });
    const std::string merge = is_group ? "flash_attn_vec_merge_" : "flash_attn_vec_reduce_";
    record(NodeKind::kSdpa,
           with_head_dim(merge + (op.fused_undo ? "tq_hb_undo_dk"
                                  : is_group    ? "tq_hb_dk"
                                                : "dk"),
                         args.head_dim),
           merge_launch(call), [attention](cudaStream_t stream) {
             launch_merge(attention->call, stream);
             attention->partials.reset();
           });
  }

  void encode(FwhtOp op) override {
    check_aligned(op.name, "x", op.data);
    const std::uint64_t head_dim = op.data.shape().back();
    const TransformCall call{transform_of(op.kind), static_cast<TqU32>(head_dim),
                             checked_rows(op.name, op.data.size() / head_dim), device_data<float>(op.data)};
    if (call.rows == 0) return;
    hold({&op.data});
    record(NodeKind::kOther, with_head_dim(kernel_prefix(op.kind), head_dim), transform_launch(call),
           [call](cudaStream_t stream) { launch(call, stream); });
  }

  void encode_barrier() override {}

  void submit() override {
    const CurrentDevice current(*context_);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream_, &capture), "cuda: asking for the stream's state");
    is_running_ = capture == cudaStreamCaptureStatusNone;
    try {
      if (is_running_) {
        stopwatch_.start(stream_);
      } else {
        bad_rows_.expect_replays();
      }
      for (const Recorded& recorded : launches_) {
        recorded.launch_on(stream_);
        check_cuda(cudaGetLastError(), "cuda: launching " + recorded.kernel);
      }
      stopwatch_.stop(stream_);
    } catch (const Error& error) {
      launch_failure_ = error;
    }
    launches_.clear();
  }

  double finish() override {
    if (launch_failure_) throw *launch_failure_;
    const CurrentDevice current(*context_);
    is_running_ = false;
    bad_rows_.check(stream_);
    return stopwatch_.seconds();
  }

  bool has_finished() const override {
    const CurrentDevice current(*context_);
    return launch_failure_ || !is_running_ || stopwatch_.has_stopped();
  }

  struct Recorded {
    std::string kernel;
    LaunchOn launch_on;
  };

  std::shared_ptr<CudaContext> context_;
  cudaStream_t stream_;
  std::vector<Recorded> launches_;
  std::vector<std::shared_ptr<Storage>> storages_;  // what the launches use, a captured graph's later ones too
  Stopwatch stopwatch_;
  bool is_running_ = false;
  std::optional<Error> launch_failure_;
  BadRowWords bad_rows_;  // goes first, when the launches are done
};

}  // namespace

std::unique_ptr<CommandEncoder> make_cuda_encoder(const Device* device, std::shared_ptr<CudaContext> context,
                                                  cudaStream_t stream, bool auto_barrier) {
  return std::make_unique<CudaEncoder>(device, context, stream, auto_barrier);
}

}  // namespace tq_hb

#include "cuda/device.h"

#include <string>
#include <utility>

#include "cuda/context.h"
#include "cuda/encoder.h"
#include "cuda/kernels/kernels.h"
#include "cuda/storage.h"

namespace tq_hb {
namespace {

constexpr int kOldestMajor = 8;  // compute capability

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int ordinal) : context_(std::make_shared<CudaContext>(ordinal)) {}

  std::string name() const override { return context_->properties().name; }
  std::string backend() const override { return "cuda"; }
  DeviceLimits limits() const override {
    const cudaDeviceProp& gpu = context_->properties();
    return {gpu.totalGlobalMem, 0, gpu.sharedMemPerBlockOptin, static_cast<std::uint64_t>(gpu.maxThreadsPerBlock),
            static_cast<unsigned>(gpu.multiProcessorCount)};
  }
  bool offers(AttendKernel kernel, std::uint64_t head_dim, Packing, unsigned, unsigned) const override {
    if (kernel == AttendKernel::kPerHead) return true;
    return head_dim >= 128 && context_->properties().sharedMemPerBlockOptin >= kGroupSharedBytes;
  }
  void check_usable(const std::string& op) const override {
    if (!context_->is_forked()) return;
    throw Error(ErrorCode::kDevice, op + ": CUDA cannot be used in a forked child of the process that opened the "
                                         "device; start the child by spawn, or open the device only there");
  }
  void release_to(std::uintptr_t stream) const override {
    const CurrentDevice current(*context_);
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cuda: making an event");
    cudaError_t result = cudaEventRecord(event, context_->stream());
    if (result == cudaSuccess) result = cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(stream), event, 0);
    static_cast<void>(cudaEventDestroy(event));
    check_cuda(result, "cuda: ordering a stream");
  }
  bool is_capturing(std::uintptr_t stream) const override {
    const CurrentDevice current(*context_);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(reinterpret_cast<cudaStream_t>(stream), &capture),
               "cuda: asking for the stream's state");
    return capture != cudaStreamCaptureStatusNone;
  }

 private:
  std::shared_ptr<Storage> allocate(std::uint64_t size) const override {
    return std::make_shared<CudaStorage>(this, context_, size);
  }
  std::shared_ptr<Storage> borrow_host(std::byte*, std::uint64_t, std::shared_ptr<void>) const override {
    return nullptr;
  }
  std::shared_ptr<Storage> borrow_address(std::uintptr_t address, std::uint64_t size,
                                          std::shared_ptr<void> owner) const override {
    return std::make_shared<CudaStorage>(this, context_, reinterpret_cast<void*>(address), size, std::move(owner));
  }
  std::unique_ptr<CommandEncoder> new_encoder(bool auto_barrier) const override {
    return make_cuda_encoder(this, context_, context_->stream(), auto_barrier);
  }
  std::unique_ptr<CommandEncoder> new_encoder_on(std::uintptr_t stream, bool auto_barrier) const override {
    return make_cuda_encoder(this, context_, reinterpret_cast<cudaStream_t>(stream), auto_barrier);
  }
  void prepare(const std::vector<unsigned>&) const override {}

  std::shared_ptr<CudaContext> context_;
};

std::shared_ptr<Device> make_cuda_device() {
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "asking for the driver's version");
  if (driver == 0) throw Error(ErrorCode::kDevice, "this system has no NVIDIA driver");
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "looking for GPUs");
  if (count == 0) throw Error(ErrorCode::kDevice, "the driver shows no GPU");
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "reading the GPU's properties");
  if (major < kOldestMajor) {
    throw Error(ErrorCode::kDevice, "the GPU's compute capability is " + std::to_string(major) + ".x, and it needs " +
                                        std::to_string(kOldestMajor) + ".0");
  }
  return std::make_shared<CudaDevice>(0);
}

}  // namespace

const std::shared_ptr<Device>& cuda_device() {
  // Never destroyed: at the end of the process the driver may be gone first.
  static const auto* const device = new std::shared_ptr<Device>(make_cuda_device());
  return *device;
}

}  // namespace tq_hb

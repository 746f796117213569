// What the parts of the CUDA backend share: a GPU, the stream of the device's own, and the process they belong to.
//
// May be used from any thread.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

namespace tq_hb {

/// Throws what a CUDA call reports.
void check_cuda(cudaError_t result, const std::string& what);

class CudaContext {
 public:
  explicit CudaContext(int ordinal);
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  int ordinal() const noexcept { return ordinal_; }
  const cudaDeviceProp& properties() const noexcept { return properties_; }
  /// Waits for the legacy default stream and it for this one: what other libraries do there is in order with ours.
  cudaStream_t stream() const noexcept { return stream_; }

  /// Whether this is a child of the process that opened the GPU. CUDA must not be called there.
  bool is_forked() const noexcept;

  /// Device memory of kStatusWords words that hold TQ_STATUS_OK, to be given back in that state.
  std::uint32_t* take_status();
  void give_back_status(std::uint32_t* words);

 private:
  int ordinal_;
  int pid_;
  cudaDeviceProp properties_{};
  cudaStream_t stream_ = nullptr;
  std::mutex status_mutex_;
  std::vector<std::uint32_t*> free_status_;
};

constexpr std::size_t kStatusWords = 8;

/// Makes the context's GPU the thread's current one while it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(const CudaContext& context);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace tq_hb

#include "cuda/context.h"

#include <limits>

#include <unistd.h>

#include "core/error.h"

namespace tq_hb {
namespace {

constexpr std::size_t kStatusBlocks = 8192;  // made at a time

}  // namespace

void check_cuda(cudaError_t result, const std::string& what) {
  if (result == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // an error that is not sticky would be reported again by the next launch
  const ErrorCode code = result == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kDevice;
  throw Error(code, what + ": " + cudaGetErrorString(result));
}

CudaContext::CudaContext(int ordinal) : ordinal_(ordinal), pid_(getpid()) {
  const CurrentDevice current(*this);
  check_cuda(cudaGetDeviceProperties(&properties_, ordinal), "cuda: reading the GPU's properties");
  check_cuda(cudaStreamCreate(&stream_), "cuda: making a stream");
  // Memory that is freed stays with the pool: the buffers of a call are there again for the next one.
  cudaMemPool_t pool = nullptr;
  std::uint64_t keep = std::numeric_limits<std::uint64_t>::max();
  check_cuda(cudaDeviceGetDefaultMemPool(&pool, ordinal), "cuda: finding the memory pool");
  check_cuda(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "cuda: setting up the memory pool");
  give_back_status(take_status());  // a stream that is being captured must not find that it has to allocate
}

bool CudaContext::is_forked() const noexcept {
  return getpid() != pid_;
}

std::uint32_t* CudaContext::take_status() {
  const std::lock_guard<std::mutex> lock(status_mutex_);
  if (free_status_.empty()) {
    const CurrentDevice current(*this);
    constexpr std::size_t kBytes = kStatusBlocks * kStatusWords * sizeof(std::uint32_t);
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, kBytes), "cuda: allocating status words");
    check_cuda(cudaMemset(memory, 0xFF, kBytes), "cuda: setting status words");
    auto* words = static_cast<std::uint32_t*>(memory);
    for (std::size_t i = 0; i < kStatusBlocks; ++i) free_status_.push_back(words + i * kStatusWords);
  }
  std::uint32_t* words = free_status_.back();
  free_status_.pop_back();
  return words;
}

void CudaContext::give_back_status(std::uint32_t* words) {
  const std::lock_guard<std::mutex> lock(status_mutex_);
  free_status_.push_back(words);
}

CurrentDevice::CurrentDevice(const CudaContext& context) {
  check_cuda(cudaGetDevice(&before_), "cuda: asking for the current GPU");
  changed_ = before_ != context.ordinal();
  if (changed_) check_cuda(cudaSetDevice(context.ordinal()), "cuda: choosing the GPU");
}

CurrentDevice::~CurrentDevice() {
  if (changed_) static_cast<void>(cudaSetDevice(before_));
}

}  // namespace tq_hb

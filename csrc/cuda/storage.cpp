#include "cuda/storage.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/error.h"

namespace tq_hb {

CudaStorage::CudaStorage(const Device* device, std::shared_ptr<CudaContext> context, std::uint64_t size)
    : Storage(device, nullptr, size), context_(std::move(context)), is_ours_(true) {
  const CurrentDevice current(*context_);
  const std::string what = "Device.empty: could not allocate " + std::to_string(size) + " bytes";
  // CUDA has no empty allocations.
  const std::uint64_t bytes = std::max<std::uint64_t>(size, 1);
  check_cuda(cudaMallocAsync(&data_, bytes, context_->stream()), what);
  check_cuda(cudaMemsetAsync(data_, 0, bytes, context_->stream()), what);
  // Any stream may be the first to use it.
  check_cuda(cudaStreamSynchronize(context_->stream()), what);
}

CudaStorage::CudaStorage(const Device* device, std::shared_ptr<CudaContext> context, void* data, std::uint64_t size,
                         std::shared_ptr<void> owner)
    : Storage(device, nullptr, size),
      context_(std::move(context)),
      owner_(std::move(owner)),
      data_(data),
      is_ours_(false) {}

CudaStorage::~CudaStorage() {
  if (!is_ours_ || data_ == nullptr || context_->is_forked()) return;
  try {
    const CurrentDevice current(*context_);
    // Encoders hold what they use until it is done; what was lent is freed by its last borrower.
    static_cast<void>(cudaFreeAsync(data_, context_->stream()));
  } catch (const Error&) {
    // The process is ending, and the driver with it.
  }
}

void CudaStorage::transfer(void* target, const void* source, std::uint64_t size, cudaMemcpyKind kind) const {
  if (size == 0) return;
  const CurrentDevice current(*context_);
  check_cuda(cudaMemcpyAsync(target, source, size, kind, context_->stream()), "Buffer: copying");
  check_cuda(cudaStreamSynchronize(context_->stream()), "Buffer: copying");
}

void CudaStorage::read(std::uint64_t offset, void* target, std::uint64_t size) const {
  transfer(target, at(offset), size, cudaMemcpyDeviceToHost);
}

void CudaStorage::write(std::uint64_t offset, const void* source, std::uint64_t size) const {
  transfer(at(offset), source, size, cudaMemcpyHostToDevice);
}

void CudaStorage::copy(std::uint64_t offset, const Storage& source, std::uint64_t source_offset,
                       std::uint64_t size) const {
  transfer(at(offset), static_cast<const CudaStorage&>(source).at(source_offset), size, cudaMemcpyDeviceToDevice);
}

}  // namespace tq_hb

// Dispatches in a file, with their source and the contents of their buffers, to be run again by the driver.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "engine.h"

namespace metal_sim {

/// Batches that can be executed, and the memory they use.
class Recording {
 public:
  /// Compiles the sources anew, with the options in force. Throws std::runtime_error on a file of another form.
  explicit Recording(const std::filesystem::path& file);
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  const std::vector<Batch>& batches() const { return batches_; }

 private:
  std::vector<std::pair<std::byte*, std::size_t>> memory_;
  std::vector<Batch> batches_;
};

void write_recording(const std::vector<Batch>& batches, const std::filesystem::path& file);

/// Writes a recording into the folder, unless it has one of the same kernels with the same constants.
void record_variant(const std::vector<Batch>& batches, const std::filesystem::path& folder);

}  // namespace metal_sim

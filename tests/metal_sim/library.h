// Compiled kernel libraries as the engine sees them.
#pragma once

#include <memory>
#include <string>

#include "engine.h"
#include "include/abi.h"

namespace metal_sim {

/// A loaded shared object. `compile` returns nothing else, so the engine may cast a Library to this.
class LoadedLibrary : public Library {
 public:
  /// Loads the file and hands it the engine's functions.
  LoadedLibrary(std::string path, std::string source, const abi::Engine& functions);
  ~LoadedLibrary() override;

  const Kernel* find(const std::string& name) const override;
  std::vector<std::string> names() const override;
  const std::vector<FunctionConstant>& constants() const override { return constants_; }

  const std::string& source() const { return source_; }
  const abi::Module& module() const { return *module_; }
  const abi::KernelEntry& entry(const Kernel& kernel) const;
  /// Whether the library's own code or static data is at the address.
  bool contains(const void* address) const { return address >= begin_ && address < end_; }
  std::uint32_t offset(const void* instruction) const {
    return static_cast<std::uint32_t>(static_cast<const std::byte*>(instruction) - begin_);
  }
  const void* instruction(std::uint32_t offset) const { return begin_ + offset; }
  /// The place in the Metal source of the instruction before this one.
  std::string describe(const void* instruction) const;

 private:
  std::string path_, source_;
  void* handle_ = nullptr;
  const abi::Module* module_ = nullptr;
  const std::byte* begin_ = nullptr;
  const std::byte* end_ = nullptr;
  std::vector<Kernel> kernels_;
  std::vector<FunctionConstant> constants_;
};

/// The functions of the engine that kernels call.
const abi::Engine& engine_functions();

}  // namespace metal_sim

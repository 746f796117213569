#include "library.h"

#include <map>
#include <mutex>
#include <set>

#include <dlfcn.h>
#include <link.h>

#include "compiler.h"
#include "process.h"

namespace metal_sim {
namespace {

ConstantType constant_type(const std::string& name) {
  static const std::map<std::string, ConstantType> types = {
      {"bool", ConstantType::kBool},     {"int", ConstantType::kInt},   {"uint", ConstantType::kUint},
      {"ushort", ConstantType::kUshort}, {"half", ConstantType::kHalf}, {"float", ConstantType::kFloat}};
  const auto found = types.find(name);
  if (found == types.end()) throw CompileError("a function constant cannot have the type " + name);
  return found->second;
}

Kernel describe_kernel(const abi::KernelEntry& entry) {
  Kernel kernel;
  kernel.name = entry.name;
  for (unsigned i = 0; i < entry.parameter_count; ++i) {
    const abi::Parameter& parameter = entry.parameters[i];
    if (parameter.attribute == abi::Attribute::kBuffer) kernel.buffers.push_back(parameter.index);
    if (parameter.attribute == abi::Attribute::kGroupMemory) kernel.threadgroup_buffers.push_back(parameter.index);
  }
  kernel.required_constants.assign(entry.constants, entry.constants + entry.constant_count);
  return kernel;
}

std::pair<const std::byte*, const std::byte*> image_range(void* symbol) {
  Dl_info info;
  link_map* map = nullptr;
  if (dladdr1(symbol, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0) {
    throw std::runtime_error("a kernel library that the loader does not know");
  }
  struct Search {
    std::uintptr_t base, end;
  } search{map->l_addr, map->l_addr};
  dl_iterate_phdr(
      [](dl_phdr_info* image, std::size_t, void* data) {
        Search& wanted = *static_cast<Search*>(data);
        if (image->dlpi_addr != wanted.base) return 0;
        for (unsigned i = 0; i < image->dlpi_phnum; ++i) {
          const auto& header = image->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          wanted.end = std::max(wanted.end, wanted.base + header.p_vaddr + header.p_memsz);
        }
        return 1;
      },
      &search);
  return {reinterpret_cast<const std::byte*>(search.base), reinterpret_cast<const std::byte*>(search.end)};
}

}  // namespace

LoadedLibrary::LoadedLibrary(std::string path, std::string source, const abi::Engine& functions)
    : path_(std::move(path)), source_(std::move(source)) {
  handle_ = dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle_ == nullptr) throw CompileError(dlerror());
  void* symbol = dlsym(handle_, abi::kEntryPoint);
  module_ = reinterpret_cast<abi::EntryPoint*>(symbol)(&functions);
  std::tie(begin_, end_) = image_range(symbol);
  for (unsigned i = 0; i < module_->kernel_count; ++i) kernels_.push_back(describe_kernel(module_->kernels[i]));
  for (unsigned i = 0; i < module_->constant_count; ++i) {
    const abi::ConstantEntry& constant = module_->constants[i];
    constants_.push_back({constant.name, constant.index, constant_type(constant.type)});
  }
}

LoadedLibrary::~LoadedLibrary() {
  dlclose(handle_);
}

const Kernel* LoadedLibrary::find(const std::string& name) const {
  for (const Kernel& kernel : kernels_) {
    if (kernel.name == name) return &kernel;
  }
  return nullptr;
}

std::vector<std::string> LoadedLibrary::names() const {
  std::vector<std::string> names;
  for (const Kernel& kernel : kernels_) names.push_back(kernel.name);
  return names;
}

const abi::KernelEntry& LoadedLibrary::entry(const Kernel& kernel) const {
  return module_->kernels[&kernel - kernels_.data()];
}

std::string LoadedLibrary::describe(const void* instruction) const {
  if (!contains(instruction)) return "outside the kernels";
  // The address is one of a call's return or of a faulting instruction; one byte back is inside the former.
  const auto offset = static_cast<const std::byte*>(instruction) - begin_ - 1;
  char hex[32];
  std::snprintf(hex, sizeof(hex), "0x%zx", static_cast<std::size_t>(offset));
  const ProcessResult result = run_process({METAL_SIM_ADDR2LINE, "-C", "-f", "-i", "-e", path_, hex});
  // Pairs of lines, function and place, from the innermost inlined function outwards. The shim's own are skipped.
  std::size_t start = 0;
  while (start < result.output.size()) {
    const std::size_t middle = result.output.find('\n', start);
    const std::size_t end = result.output.find('\n', middle + 1);
    if (middle == std::string::npos || end == std::string::npos) break;
    std::string place = result.output.substr(middle + 1, end - middle - 1);
    if (const std::size_t note = place.find(" (discriminator"); note != std::string::npos) place.resize(note);
    if (place.find(METAL_SIM_FOLDER "/include/") == std::string::npos) {
      while (place.compare(0, 2, "./") == 0) place.erase(0, 2);
      return place;
    }
    start = end + 1;
  }
  return "an unknown line";
}

std::shared_ptr<const Library> compile(const std::string& source) {
  return std::make_shared<LoadedLibrary>(compiled_file(source, read_options()), source, engine_functions());
}

}  // namespace metal_sim

#include "recording.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <sstream>

#include <unistd.h>

#include "hash.h"
#include "library.h"

namespace metal_sim {
namespace {

constexpr std::uint64_t kFormat = 0x31636572'6d69736dULL;

class Writer {
 public:
  explicit Writer(std::ostream& out) : out_(out) {}
  void number(std::uint64_t value) { out_.write(reinterpret_cast<const char*>(&value), sizeof(value)); }
  void bytes(const void* data, std::size_t size) {
    number(size);
    out_.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
  }
  void text(const std::string& value) { bytes(value.data(), value.size()); }
  void size3(const Size3& size) {
    for (const std::uint32_t extent : {size.width, size.height, size.depth}) number(extent);
  }

 private:
  std::ostream& out_;
};

class Reader {
 public:
  explicit Reader(std::istream& in) : in_(in) {
    in_.exceptions(std::ios::failbit | std::ios::badbit | std::ios::eofbit);
  }
  std::uint64_t number() {
    std::uint64_t value = 0;
    in_.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
  }
  void bytes(void* data, std::size_t size) { in_.read(static_cast<char*>(data), static_cast<std::streamsize>(size)); }
  std::string text() {
    std::string value(number(), '\0');
    bytes(value.data(), value.size());
    return value;
  }
  Size3 size3() {
    Size3 size;
    for (std::uint32_t* extent : {&size.width, &size.height, &size.depth})
      *extent = static_cast<std::uint32_t>(number());
    return size;
  }

 private:
  std::istream& in_;
};

/// Stretches of memory that the bindings cover; overlapping bindings share one.
using Segments = std::vector<std::pair<std::byte*, std::byte*>>;

Segments segments_of(const std::vector<Batch>& batches) {
  Segments ranges, merged;
  for (const Batch& batch : batches) {
    for (const Dispatch& dispatch : batch) {
      for (const unsigned slot : dispatch.kernel->buffers) {
        const Binding& binding = dispatch.buffers[slot];
        if (binding.data != nullptr) ranges.push_back({binding.data, binding.data + binding.size});
      }
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (const auto& range : ranges) {
    if (!merged.empty() && range.first < merged.back().second) {
      merged.back().second = std::max(merged.back().second, range.second);
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

std::vector<const LoadedLibrary*> libraries_of(const std::vector<Batch>& batches) {
  std::vector<const LoadedLibrary*> libraries;
  for (const Batch& batch : batches) {
    for (const Dispatch& dispatch : batch) {
      const auto* library = static_cast<const LoadedLibrary*>(dispatch.library.get());
      if (std::find(libraries.begin(), libraries.end(), library) == libraries.end()) libraries.push_back(library);
    }
  }
  return libraries;
}

template <class T>
std::size_t index_of(const std::vector<T>& values, const T& value) {
  return static_cast<std::size_t>(std::find(values.begin(), values.end(), value) - values.begin());
}

void write_dispatch(Writer& out, const Dispatch& dispatch, std::size_t library, const Segments& segments) {
  out.number(library);
  out.text(dispatch.kernel->name);
  out.number(dispatch.constants.size());
  for (const auto& [index, value] : dispatch.constants) {
    out.number(index);
    out.bytes(value.data(), value.size());
  }
  out.number(dispatch.kernel->buffers.size());
  for (const unsigned slot : dispatch.kernel->buffers) {
    const Binding& binding = dispatch.buffers[slot];
    const auto segment = std::find_if(segments.begin(), segments.end(), [&](const auto& range) {
      return binding.data >= range.first && binding.data < range.second;
    });
    out.number(slot);
    out.number(static_cast<std::uint64_t>(segment - segments.begin()));
    out.number(static_cast<std::uint64_t>(binding.data - segment->first));
    out.number(binding.size);
    out.text(binding.label);
  }
  for (const std::uint32_t bytes : dispatch.threadgroup_bytes) out.number(bytes);
  out.size3(dispatch.threadgroups);
  out.size3(dispatch.threads);
}

}  // namespace

void write_recording(const std::vector<Batch>& batches, const std::filesystem::path& file) {
  const Segments segments = segments_of(batches);
  const std::vector<const LoadedLibrary*> libraries = libraries_of(batches);
  std::ofstream stream(file, std::ios::binary);
  Writer out(stream);
  out.number(kFormat);
  out.number(libraries.size());
  for (const LoadedLibrary* library : libraries) out.text(library->source());
  out.number(segments.size());
  for (const auto& [begin, end] : segments) out.bytes(begin, static_cast<std::size_t>(end - begin));
  out.number(batches.size());
  for (const Batch& batch : batches) {
    out.number(batch.size());
    for (const Dispatch& dispatch : batch) {
      const auto* library = static_cast<const LoadedLibrary*>(dispatch.library.get());
      write_dispatch(out, dispatch, index_of(libraries, library), segments);
    }
  }
  if (!stream.flush()) throw std::runtime_error("cannot write " + file.string());
}

void record_variant(const std::vector<Batch>& batches, const std::filesystem::path& folder) {
  std::string variant;
  for (const Batch& batch : batches) {
    for (const Dispatch& dispatch : batch) {
      variant += dispatch.kernel->name;
      for (const auto& [index, value] : dispatch.constants) {
        variant += " " + std::to_string(index) + "=";
        for (const std::byte byte : value) variant += std::to_string(static_cast<unsigned>(byte)) + ".";
      }
      variant += "; ";
    }
  }
  if (variant.empty()) return;
  std::filesystem::create_directories(folder);
  const std::filesystem::path file =
      folder / (batches.front().front().kernel->name + "_" + hash_text(variant) + ".sim");
  if (std::filesystem::exists(file)) return;
  const std::filesystem::path unfinished = file.string() + "." + std::to_string(getpid());
  write_recording(batches, unfinished);
  std::filesystem::rename(unfinished, file);
}

Recording::Recording(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  Reader in(stream);
  if (in.number() != kFormat) throw std::runtime_error(file.string() + " is not a recording");
  std::vector<std::shared_ptr<const Library>> libraries(in.number());
  for (auto& library : libraries) library = compile(in.text());
  memory_.resize(in.number());
  for (auto& [data, size] : memory_) {
    size = in.number();
    data = allocate(size);
    in.bytes(data, size);
  }
  batches_.resize(in.number());
  for (Batch& batch : batches_) {
    batch.resize(in.number());
    for (Dispatch& dispatch : batch) {
      dispatch.library = libraries.at(in.number());
      dispatch.kernel = dispatch.library->find(in.text());
      for (std::uint64_t left = in.number(); left > 0; --left) {
        const auto index = static_cast<unsigned>(in.number());
        dispatch.constants[index].resize(in.number());
        in.bytes(dispatch.constants[index].data(), dispatch.constants[index].size());
      }
      for (std::uint64_t left = in.number(); left > 0; --left) {
        Binding& binding = dispatch.buffers.at(in.number());
        binding.data = memory_.at(in.number()).first;
        binding.data += in.number();
        binding.size = in.number();
        binding.label = in.text();
      }
      for (std::uint32_t& bytes : dispatch.threadgroup_bytes) bytes = static_cast<std::uint32_t>(in.number());
      dispatch.threadgroups = in.size3();
      dispatch.threads = in.size3();
    }
  }
}

Recording::~Recording() {
  for (const auto& [data, size] : memory_) release(data, size);
}

}  // namespace metal_sim

// What the simulator's own tests share: kernels from files, buffers, environment variables, dispatches.
#pragma once

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "engine.h"

namespace metal_sim::selftest {

inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  EXPECT_TRUE(file) << path;
  return text.str();
}

/// The source of a file under its own name, with or without the bug that is seeded in it.
inline std::string source_of(const std::filesystem::path& path, bool with_bug) {
  return std::string(with_bug ? "#define BUG\n" : "") + "#line 1 \"" + path.filename().string() + "\"\n" +
         read_text(path);
}

/// The number of the line that holds the text.
inline std::string line_with(const std::filesystem::path& path, const std::string& text) {
  std::ifstream file(path);
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.find(text) != std::string::npos) return std::to_string(number);
  }
  ADD_FAILURE() << path << " has no line with " << text;
  return "";
}

/// The files of a folder, in order.
inline std::vector<std::filesystem::path> files_in(const std::string& folder) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(std::string(SELFTEST_FOLDER "/") + folder)) {
    files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

/// A test parameter's name.
inline std::string stem(const std::filesystem::path& path) {
  return path.stem().string();
}

class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    setenv(name, value, 1);
  }
  ~Environment() { setenv(name_, old_.c_str(), 1); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
  std::string old_;
};

/// Guarded memory with values in it.
template <class T>
class Array {
 public:
  explicit Array(std::vector<T> values) : size_(values.size()), data_(allocate(bytes())) {
    std::memcpy(data_, values.data(), bytes());
  }
  ~Array() { release(data_, bytes()); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  /// From the element on.
  Binding binding(std::size_t first = 0, std::string label = "") const {
    return {data_ + first * sizeof(T), bytes() - first * sizeof(T), std::move(label)};
  }
  std::vector<T> values() const {
    std::vector<T> values(size_);
    std::memcpy(values.data(), data_, bytes());
    return values;
  }

 private:
  std::size_t bytes() const { return size_ * sizeof(T); }

  std::size_t size_;
  std::byte* data_;
};

/// Of the library's only kernel, or of the one named.
inline Dispatch dispatch_of(std::shared_ptr<const Library> library, std::vector<Binding> buffers, Size3 threadgroups,
                            Size3 threads, const std::string& kernel = "") {
  Dispatch dispatch;
  dispatch.kernel = library->find(kernel.empty() ? library->names().at(0) : kernel);
  EXPECT_NE(dispatch.kernel, nullptr) << kernel;
  dispatch.library = std::move(library);
  for (std::size_t i = 0; i < buffers.size(); ++i) dispatch.buffers[i] = std::move(buffers[i]);
  dispatch.threadgroups = threadgroups;
  dispatch.threads = threads;
  return dispatch;
}

/// The message of the exception that the call throws; "" if it throws none of that type.
template <class Exception, class Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const Exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace metal_sim::selftest

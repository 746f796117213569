#include "compiler.h"

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include <unistd.h>

#include "engine.h"
#include "hash.h"
#include "process.h"
#include "sanitizers.h"

namespace metal_sim {
namespace {

namespace fs = std::filesystem;

std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) throw std::runtime_error("cannot read " + path.string());
  return text.str();
}

void write_file(const fs::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
}

std::vector<std::string> compiler_flags(const Options& options) {
  std::vector<std::string> flags = {
      "-std=c++17", "-O2", "-g", "-fPIC", "-shared", "-nostdinc", "-nostdinc++", "-fvisibility=hidden", "-w",
      "-isystem", METAL_SIM_FOLDER "/include", "-fdebug-compilation-dir=.",
      // A literal without suffix is a float in Metal, and half operations round to half every time.
      "-Xclang", "-cl-single-precision-constant", "-Xclang", "-ffloat16-excess-precision=none"};
  const auto add = [&](std::initializer_list<const char*> more) {
    flags.insert(flags.end(), more.begin(), more.end());
  };
#if defined(__x86_64__)
  add({"-march=x86-64-v3"});
#endif
  if (options.contract) {
    // Kernels that forbid contraction by a pragma are still obeyed.
    add({"-ffp-contract=fast-honor-pragmas"});
  } else {
    add({"-ffp-contract=off"});
  }
  if (options.check) {
    // One call for every access that the source makes: nothing merged into wide vectors or library calls.
    add({"-DMETAL_SIM_TRACE", "-fno-vectorize", "-fno-slp-vectorize", "-fno-builtin", "-mllvm",
         "-disable-loop-idiom-all", "-fsanitize-coverage=edge,trace-loads,trace-stores",
         "-fsanitize=alignment,array-bounds,integer-divide-by-zero"});
  }
  if (under_thread_sanitizer()) add({"-fsanitize=thread"});
  if (under_address_sanitizer()) add({"-fsanitize=address"});
  return flags;
}

/// Everything besides the source and the flags that the result depends on.
std::string tool_texts() {
  std::vector<fs::path> paths;
  for (const char* folder : {"include", "macros", "translator"}) {
    for (const auto& entry : fs::directory_iterator(fs::path(METAL_SIM_FOLDER) / folder)) {
      if (entry.is_regular_file()) paths.push_back(entry.path());
    }
  }
  paths.push_back(fs::path(METAL_SIM_FOLDER) / "translate.py");
  std::sort(paths.begin(), paths.end());
  std::string text = METAL_SIM_COMPILER "\n";
  for (const fs::path& path : paths) text += path.string() + "\n" + read_file(path);
  return text;
}

std::string cache_key(const std::string& source, const std::vector<std::string>& flags) {
  static const std::string tools = tool_texts();
  std::string text = tools + source;
  for (const std::string& flag : flags) text += flag + "\n";
  return hash_text(text);
}

void run_or_throw(const std::vector<std::string>& command) {
  const ProcessResult result = run_process(command);
  if (result.status != 0) throw CompileError(result.output);
}

}  // namespace

std::string compiled_file(const std::string& source, const Options& options) {
  const std::vector<std::string> flags = compiler_flags(options);
  const fs::path folder = METAL_SIM_CACHE;
  const std::string key = cache_key(source, flags);
  const fs::path result = folder / (key + ".so");
  if (fs::exists(result)) return result.string();

  // Names of our own until the result is complete: other processes may be building the same source.
  fs::create_directories(folder);
  static std::atomic<unsigned> serial{0};
  const std::string base = (folder / (key + "." + std::to_string(getpid()) + "." + std::to_string(serial++))).string();
  write_file(base + ".metal", "#line 1 \"program_source\"\n" + source);
  struct Cleanup {
    std::string base;
    ~Cleanup() {
      std::error_code ignored;
      for (const char* suffix : {".metal", ".cpp", ".so"}) fs::remove(base + suffix, ignored);
    }
  } cleanup{base};
  run_or_throw({METAL_SIM_PYTHON, "-B", METAL_SIM_FOLDER "/translate.py", "--compiler", METAL_SIM_COMPILER, "run",
                base + ".metal", base + ".cpp"});
  std::vector<std::string> command = {METAL_SIM_COMPILER};
  command.insert(command.end(), flags.begin(), flags.end());
  command.insert(command.end(), {base + ".cpp", "-o", base + ".so"});
  run_or_throw(command);
  fs::rename(base + ".so", result);
  return result.string();
}

}  // namespace metal_sim

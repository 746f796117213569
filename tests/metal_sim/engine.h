// Runs compiled Metal kernels on the host: what the simulated Metal framework is built on.
//
// One instance per process. Calls may come from any thread; `execute` runs one after the other. What a run
// should look out for is asked of the environment every time; see options.h.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace metal_sim {

constexpr unsigned kMaxBuffers = 31;
constexpr unsigned kMaxThreadgroupBuffers = 31;
constexpr unsigned kSimdWidth = 32;
constexpr unsigned kMaxThreadsPerThreadgroup = 1024;
constexpr unsigned kMaxThreadgroupBytes = 32768;

/// The source does not compile; what() is the compiler's message with line and column.
class CompileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A kernel did what it must not; what() names the kernel, the place and the line.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class ConstantType { kBool, kInt, kUint, kUshort, kHalf, kFloat };

struct FunctionConstant {
  std::string name;
  unsigned index;
  ConstantType type;
};

struct Kernel {
  std::string name;
  std::vector<unsigned> buffers;              ///< slots of its [[buffer(n)]] parameters
  std::vector<unsigned> threadgroup_buffers;  ///< slots of its [[threadgroup(n)]] parameters
  std::vector<unsigned> required_constants;   ///< function constants that it reads without asking for a definition
};

/// One compiled source. Kept loaded for as long as somebody holds it.
class Library {
 public:
  virtual ~Library() = default;
  virtual const Kernel* find(const std::string& name) const = 0;
  virtual std::vector<std::string> names() const = 0;
  virtual const std::vector<FunctionConstant>& constants() const = 0;
};

/// Compiles MSL source, or takes it from the cache; throws CompileError.
std::shared_ptr<const Library> compile(const std::string& source);

struct Size3 {
  std::uint32_t width = 1, height = 1, depth = 1;
};

struct Binding {
  std::byte* data = nullptr;  ///< null where nothing is bound
  std::size_t size = 0;       ///< bytes from `data` to the end of the buffer
  std::string label;          ///< the buffer's label, under which its traffic is counted; "" counts by slot
};

struct Dispatch {
  std::shared_ptr<const Library> library;
  const Kernel* kernel = nullptr;
  std::map<unsigned, std::vector<std::byte>> constants;  ///< function constants by index
  std::array<Binding, kMaxBuffers> buffers;
  std::array<std::uint32_t, kMaxThreadgroupBuffers> threadgroup_bytes{};
  Size3 threadgroups, threads;
};

/// Dispatches that no barrier separates: they may run in any order.
using Batch = std::vector<Dispatch>;

/// Runs the batches in order and returns the seconds taken; throws Fault.
double execute(const std::vector<Batch>& batches);

/// Zeroed memory on whole pages whose end (rounded up to 16 bytes) touches an inaccessible page.
std::byte* allocate(std::size_t size);
void release(std::byte* memory, std::size_t size) noexcept;

}  // namespace metal_sim

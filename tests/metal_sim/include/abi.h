// What the engine and a compiled kernel library know of each other.
//
// Included by both sides; kernels are compiled without any system header, so this file needs none.
#pragma once

namespace metal_sim::abi {

constexpr unsigned kLanes = 32;
constexpr unsigned kSlots = 31;

/// Where in the Metal source an operation stands.
struct Site {
  const char* file;
  unsigned line, column;
};

/// One lane's value in a simdgroup operation; the widest type is a vector of four longs.
struct alignas(16) Slot {
  unsigned char bytes[32];
};

using Combine = void(Slot* slots, unsigned lanes);

enum class Shuffle : unsigned { kFrom, kBroadcast, kXor, kUp, kDown };
enum class Scope : unsigned { kSimdgroup, kGroup };
enum MemoryFlags : unsigned { kNoMemory = 0, kDeviceMemory = 1, kGroupMemory = 2 };

/// The engine's functions, handed to a library when it is loaded.
struct Engine {
  /// Each lane gives *value and gets another lane's; all lanes of the simdgroup take part.
  void (*shuffle)(Site, void* value, unsigned size, Shuffle, unsigned operand);
  /// `combine` turns the lanes' values into their results, in place.
  void (*reduce)(Site, void* value, unsigned size, Combine*);
  void (*barrier)(Site, Scope, unsigned memory_flags);
  unsigned (*lane)();
  /// Called by every thread that passes the declaration of a variable in threadgroup memory.
  void (*declare)(void* memory, unsigned long size, const char* name);
  /// A load or store, where the library was compiled to report them.
  void (*access)(const void* address, unsigned size, bool is_write, const void* instruction);
  /// An atomic operation announces itself; the accesses it is made of are then no plain ones.
  void (*begin_atomic)(const void* address, unsigned size, bool is_write);
  void (*end_atomic)();
  /// Ends the dispatch with a fault. Does not return.
  void (*fail)(Site, const char* message);
};

enum class Attribute : unsigned {
  kBuffer,
  kGroupMemory,
  kThreadPositionInGrid,
  kGroupPositionInGrid,
  kThreadPositionInGroup,
  kThreadIndexInGroup,
  kSimdgroupIndexInGroup,
  kThreadIndexInSimdgroup,
  kThreadsPerGroup,
  kGroupsPerGrid,
  kThreadsPerGrid,
  kSimdgroupsPerGroup,
  kThreadsPerSimdgroup,
};

struct Parameter {
  Attribute attribute;
  unsigned index;
};

/// What all threads of a threadgroup share.
struct GroupArguments {
  void* buffers[kSlots];
  void* memory[kSlots];
  unsigned position[3], threads[3], groups[3];
};

struct Arguments {
  const GroupArguments* group;
  unsigned position[3];
  unsigned index;
};

struct KernelEntry {
  const char* name;
  void (*call)(const Arguments&);
  const Parameter* parameters;
  unsigned parameter_count;
  /// Function constants that the kernel reads without asking whether they are defined.
  const unsigned* constants;
  unsigned constant_count;
};

struct ConstantEntry {
  const char* name;
  unsigned index;
  const char* type;
  unsigned size;
  void* value;
  bool* is_defined;
};

struct Module {
  const KernelEntry* kernels;
  unsigned kernel_count;
  const ConstantEntry* constants;
  unsigned constant_count;
  /// Computes the program-scope constants that depend on function constants.
  void (*update_constants)();
};

/// The one symbol that a library exports.
constexpr const char* kEntryPoint = "metal_sim_load";
using EntryPoint = const Module*(const Engine*);

}  // namespace metal_sim::abi

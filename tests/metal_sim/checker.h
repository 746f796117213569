// Looks up every access of kernels that were compiled to report them.
//
// Finds accesses outside what is bound, reads of threadgroup memory that nobody wrote, and races: two accesses
// to one byte, not both atomic and one a write, that nothing orders. Barriers order the accesses of a
// threadgroup, or of a simdgroup, to the kinds of memory they name; the end of a batch orders everything. The
// threads run one after another, so a counter that steps at every barrier tells what came before it.
#pragma once

#include <array>
#include <map>
#include <string>
#include <vector>

#include "binding.h"
#include "library.h"
#include "machine.h"
#include "shadow.h"
#include "statistics.h"

namespace metal_sim {

/// Lives as long as an execution.
class Checker : public MachineObserver {
 public:
  void begin_batch();
  void begin_dispatch(const LoadedLibrary& library, const std::string& kernel, std::vector<Region> regions);
  void begin_group();
  /// Of the dispatch that began last.
  const std::map<std::string, Traffic>& traffic() const { return traffic_; }

  void barrier_passed(abi::Scope scope, unsigned simdgroup, unsigned memory_flags) override;
  void declared(void* memory, std::size_t size, const char* name) override;
  std::string access(const Access& access) override;

 private:
  using Stamp = std::uint32_t;

  /// Who else than the thread in the record has accessed the byte at the same time.
  enum class Company : std::uint8_t { kNone, kSimdgroup, kGroup };

  /// The last access of its kind to a byte.
  struct Record {
    Stamp stamp = 0;
    std::uint32_t instruction = 0;  ///< offset in the library
    std::uint16_t thread = 0;
    Company company = Company::kNone;
    bool is_atomic = false;
    bool by_other_groups = false;  ///< earlier accesses in the batch came from other threadgroups
  };
  struct Cell {
    Record write, read;
  };
  struct Started {
    Stamp stamp;
    const LoadedLibrary* library;
    std::string kernel;
  };

  const Region* find(const std::byte* address, std::size_t size);
  bool is_ordered(const Record& record, unsigned thread, bool is_threadgroup) const;
  bool conflicts(const Record& record, const Access& access, bool is_threadgroup) const;
  Record updated(const Record& record, const Access& access, bool is_threadgroup) const;
  std::string race(const Region& region, const Access& access, const Record& earlier, const char* what) const;

  Stamp now_ = 1, batch_start_ = 1, group_start_ = 1;
  /// When the last barrier over each kind of memory, device and threadgroup, was passed.
  std::array<Stamp, 2> group_barrier_{};
  std::array<std::array<Stamp, 2>, kMaxThreadsPerThreadgroup / abi::kLanes> simdgroup_barrier_{};
  Shadow<Cell> shadow_;
  std::vector<Region> regions_;
  const Region* last_region_ = nullptr;
  std::vector<Started> dispatches_;
  std::map<std::string, Traffic> traffic_;
  Traffic* last_traffic_ = nullptr;
};

}  // namespace metal_sim

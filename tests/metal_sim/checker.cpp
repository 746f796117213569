#include "checker.h"

#include <algorithm>

namespace metal_sim {

void Checker::begin_batch() {
  batch_start_ = ++now_;
  dispatches_.clear();
}

void Checker::begin_dispatch(const LoadedLibrary& library, const std::string& kernel, std::vector<Region> regions) {
  dispatches_.push_back({++now_, &library, kernel});
  regions_ = std::move(regions);
  last_region_ = nullptr;
  traffic_.clear();
}

void Checker::begin_group() {
  group_start_ = ++now_;
  group_barrier_.fill(group_start_);
  for (auto& barriers : simdgroup_barrier_) barriers.fill(group_start_);
}

void Checker::barrier_passed(abi::Scope scope, unsigned simdgroup, unsigned memory_flags) {
  ++now_;
  auto& barriers = scope == abi::Scope::kGroup ? group_barrier_ : simdgroup_barrier_[simdgroup];
  if ((memory_flags & abi::kDeviceMemory) != 0) barriers[0] = now_;
  if ((memory_flags & abi::kGroupMemory) != 0) barriers[1] = now_;
}

void Checker::declared(void* memory, std::size_t size, const char* name) {
  const auto* begin = static_cast<const std::byte*>(memory);
  for (const Region& region : regions_) {
    if (region.begin == begin && region.size == size) return;
  }
  regions_.push_back({begin, size, std::string("threadgroup variable ") + name, "", true});
  last_region_ = nullptr;
}

std::string Checker::access(const Access& access) {
  const auto* address = static_cast<const std::byte*>(access.address);
  const std::string verb = access.is_write ? "writes " : "reads ";
  const Region* region = find(address, access.size);
  if (region == nullptr) {
    // Tables and function constants lie in the library itself.
    if (dispatches_.back().library->contains(address)) return "";
    const bool starts_inside = find(address, 1) != nullptr;
    return verb + std::to_string(access.size) + " bytes, " +
           describe_outside(regions_, starts_inside ? address + access.size - 1 : address);
  }
  if (!region->is_threadgroup) {
    (access.is_write ? last_traffic_->written : last_traffic_->read) += access.size;
  }
  for (unsigned i = 0; i < access.size; ++i) {
    Cell& cell = shadow_[reinterpret_cast<std::uintptr_t>(address + i)];
    if (region->is_threadgroup && !access.is_write && cell.write.stamp < group_start_) {
      return "reads " + region->name + " where nothing was written yet, at byte " +
             std::to_string(address + i - region->begin);
    }
    if (conflicts(cell.write, access, region->is_threadgroup)) return race(*region, access, cell.write, "write");
    if (access.is_write && conflicts(cell.read, access, region->is_threadgroup)) {
      return race(*region, access, cell.read, "read");
    }
    Record& record = access.is_write ? cell.write : cell.read;
    record = updated(record, access, region->is_threadgroup);
  }
  return "";
}

const Region* Checker::find(const std::byte* address, std::size_t size) {
  if (last_region_ != nullptr && last_region_->contains(address, size)) return last_region_;
  for (const Region& region : regions_) {
    if (!region.contains(address, size)) continue;
    last_region_ = &region;
    if (!region.is_threadgroup) last_traffic_ = &traffic_[region.label];
    return last_region_;
  }
  return nullptr;
}

bool Checker::is_ordered(const Record& record, unsigned thread, bool is_threadgroup) const {
  if (record.stamp < group_barrier_[is_threadgroup]) return true;
  const unsigned simdgroup = thread / abi::kLanes;
  if (record.company == Company::kGroup || record.thread / abi::kLanes != simdgroup) return false;
  if (record.stamp < simdgroup_barrier_[simdgroup][is_threadgroup]) return true;
  return record.company == Company::kNone && record.thread == thread;
}

bool Checker::conflicts(const Record& record, const Access& access, bool is_threadgroup) const {
  if (record.is_atomic && access.is_atomic) return false;
  if (is_threadgroup) return record.stamp >= group_start_ && !is_ordered(record, access.thread, is_threadgroup);
  if (record.stamp < batch_start_) return false;
  return record.stamp < group_start_ || record.by_other_groups || !is_ordered(record, access.thread, is_threadgroup);
}

Checker::Record Checker::updated(const Record& record, const Access& access, bool is_threadgroup) const {
  Record next;
  next.stamp = now_;
  next.instruction = dispatches_.back().library->offset(access.instruction);
  next.thread = static_cast<std::uint16_t>(access.thread);
  next.is_atomic = access.is_atomic;
  if (record.stamp < group_start_) {
    next.by_other_groups = record.stamp >= batch_start_;
  } else {
    next.by_other_groups = record.by_other_groups;
    if (!is_ordered(record, access.thread, is_threadgroup)) {
      const bool same_simdgroup =
          record.company != Company::kGroup && record.thread / abi::kLanes == access.thread / abi::kLanes;
      next.company = same_simdgroup ? Company::kSimdgroup : Company::kGroup;
      next.is_atomic = record.is_atomic && access.is_atomic;
    }
  }
  return next;
}

std::string Checker::race(const Region& region, const Access& access, const Record& earlier, const char* what) const {
  const auto dispatch = std::find_if(dispatches_.rbegin(), dispatches_.rend(),
                                     [&](const Started& started) { return started.stamp <= earlier.stamp; });
  std::string text = std::string("a race: ") + (access.is_write ? "writes " : "reads ") + region.name + " at byte " +
                     std::to_string(static_cast<const std::byte*>(access.address) - region.begin) +
                     " with nothing that orders it after the " + what + " by ";
  if (dispatch != dispatches_.rbegin()) {
    text += "kernel " + dispatch->kernel + " of the same batch";
  } else if (earlier.stamp < group_start_ || earlier.by_other_groups) {
    text += "another threadgroup";
  } else if (earlier.company != Company::kNone) {
    text += "several threads";
  } else {
    text += "thread " + std::to_string(earlier.thread);
  }
  return text + " (" + dispatch->library->describe(dispatch->library->instruction(earlier.instruction)) + ")";
}

}  // namespace metal_sim

// Memory of the cpu device.
#pragma once

#include <cstdint>
#include <memory>

#include "core/device.h"

namespace tq_hb {

/// Zeroed memory that is paged in by its first use. Blocks of a huge page and more lie in huge pages where the system
/// gives them: a cache is read from end to end, a small page every few rows.
std::shared_ptr<Storage> allocate_host_storage(const Device* device, std::uint64_t size);

}  // namespace tq_hb

// One cell for every byte that kernels touch, made when it is first asked for.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>

namespace metal_sim {

template <class Cell>
class Shadow {
 public:
  Cell& operator[](std::uintptr_t address) {
    const std::uintptr_t number = address / kPageBytes;
    if (last_ == nullptr || number != last_number_) {
      std::unique_ptr<Page>& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      last_ = page.get();
      last_number_ = number;
    }
    return (*last_)[address % kPageBytes];
  }

 private:
  static constexpr std::size_t kPageBytes = 4096;
  using Page = std::array<Cell, kPageBytes>;

  std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> pages_;
  Page* last_ = nullptr;
  std::uintptr_t last_number_ = 0;
};

}  // namespace metal_sim

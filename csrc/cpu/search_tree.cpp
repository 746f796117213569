#include "cpu/search_tree.h"

#include <cstring>

#include "core/kept_values.h"

namespace tq_hb {
namespace {

SearchTree make_tree(const Codebook& codebook) {
  SearchTree tree{};
  const unsigned half = codebook.num_levels() / 2;
  const float* positive = codebook.boundaries + half;
  for (unsigned first = 1; first < half; first *= 2) {
    const unsigned span = half / first;  // codes below a node
    for (unsigned i = 0; i < first; ++i) {
      std::int32_t bits;
      std::memcpy(&bits, positive + i * span + span / 2 - 1, sizeof(bits));
      tree.nodes[first + i] = bits - 1;
    }
  }
  return tree;
}

}  // namespace

const SearchTree& search_tree(const Codebook& codebook) {
  static KeptValues<const Codebook*, SearchTree> kept;
  return kept.get(&codebook, [&] { return make_tree(codebook); });
}

}  // namespace tq_hb

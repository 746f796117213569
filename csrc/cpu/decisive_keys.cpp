#include "cpu/decisive_keys.h"

#include <algorithm>
#include <cmath>

namespace tq_hb {
namespace {

bool is_higher(const ScoredKey& a, const ScoredKey& b) noexcept {
  return a.score > b.score;
}

/// The highest of those above `least`: a heap with the lowest of them on top.
void choose(const NotedKeys& noted, double least, ChosenKeys& chosen) noexcept {
  for (std::size_t i = 0; i < noted.num_decisive; ++i) {
    if (!(noted.decisive[i].score > least)) continue;
    if (chosen.num_keys == ChosenKeys::kMostKeys) {
      if (!is_higher(noted.decisive[i], chosen.keys[0])) continue;
      std::pop_heap(chosen.keys, chosen.keys + chosen.num_keys--, is_higher);
    }
    chosen.keys[chosen.num_keys++] = noted.decisive[i];
    std::push_heap(chosen.keys, chosen.keys + chosen.num_keys, is_higher);
  }
}

void choose_reference(const ScoredKey& key, double max, ChosenKeys& chosen) noexcept {
  // Below the highest score; such a key says nothing of those that matter.
  constexpr double kNoWeight = 16.0;
  const auto is_same = [&](const ScoredKey& other) { return other.slot == key.slot; };
  if (key.score > max - kNoWeight && std::none_of(chosen.keys, chosen.keys + chosen.num_keys, is_same)) {
    chosen.references[chosen.num_references++] = key;
  }
}

}  // namespace

ChosenKeys choose_keys(const NotedKeys* notes, std::size_t stride, std::size_t ranges, double max,
                       double sum) noexcept {
  ChosenKeys chosen;
  double reach = 0.0;
  for (std::size_t r = 0; r < ranges; ++r) reach = std::max(reach, notes[r * stride].reach);
  if (reach <= kReach && (reach == 0.0 || kOutstandingShare * sum >= 1.0)) return chosen;
  double squares = 0.0;
  for (std::size_t r = 0; r < ranges; ++r) {
    const NotedKeys& noted = notes[r * stride];
    for (std::size_t i = 0; i < noted.num_decisive; ++i) squares += std::exp(2.0 * (noted.decisive[i].score - max));
  }
  // A key's error adds to the output's in proportion to its weight and the reach, the weights of all as squares.
  const double least =
      max + (reach > kReach ? 0.5 * std::log(squares) - std::log(reach) : std::log(kOutstandingShare * sum));
  for (std::size_t r = 0; r < ranges; ++r) choose(notes[r * stride], least, chosen);
  // One range after the other, so that references are of all parts of the cache.
  for (std::size_t i = 0; i < NotedKeys::kMostReferences; ++i) {
    for (std::size_t r = 0; r < ranges && chosen.num_references < ChosenKeys::kMostReferences; ++r) {
      const NotedKeys& noted = notes[r * stride];
      if (i < noted.num_references) choose_reference(noted.references[i], max, chosen);
    }
  }
  return chosen;
}

}  // namespace tq_hb

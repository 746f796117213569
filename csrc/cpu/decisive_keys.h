// Which keys' scores a row's output hangs on, and are to become exact: see rescore.h.
//
// The rounding of 16-bit products averages away where many keys share the weight. Where scores are far apart, a few
// keys have most of it, and the errors of their scores, which grow with the scores, are those of the output. How far
// they can be apart, and how large their errors are, a row's reach tells: the standard deviation of its scores over
// random codes.
#pragma once

#include <cstddef>

namespace tq_hb {

/// Up to here, an error is too small to show, even of a key that has all the weight.
constexpr double kSmallReach = 1.0;
/// Up to here, only that of a key that stands out does, which has more than this share of a row's weight.
constexpr double kReach = 2.0;
constexpr double kOutstandingShare = 0.25;
/// What scores with a standard deviation of 4 hardly reach, unless keys have much in common.
constexpr double kFarReach = 5.0;

struct ScoredKey {
  double score;  ///< as the softmax took it
  std::size_t slot;
};

/// Keys of a range that a row may score again.
struct NotedKeys {
  static constexpr std::size_t kMostDecisive = 16, kMostReferences = 8;

  double reach;  ///< the largest of the tiles that they are of; 0 if none is noted
  std::size_t num_decisive, num_references;
  std::size_t lowest;                     ///< of the decisive keys, once there are as many as may be
  ScoredKey decisive[kMostDecisive];      ///< that have much of the weight
  ScoredKey references[kMostReferences];  ///< whatever weight they have
};

/// Those of a row that are to be scored again.
struct ChosenKeys {
  static constexpr std::size_t kMostKeys = 16, kMostReferences = 2 * NotedKeys::kMostReferences;

  std::size_t num_keys = 0, num_references = 0;
  ScoredKey keys[kMostKeys];              ///< whose scores are to become exact
  ScoredKey references[kMostReferences];  ///< others, that say what the errors of all keys have in common
};

/// Chooses among the keys that a row noted in `ranges` ranges, notes[0], notes[stride], ...; `max` is its highest
/// score, and `sum` that of its weights, exp(score - max).
ChosenKeys choose_keys(const NotedKeys* notes, std::size_t stride, std::size_t ranges, double max, double sum) noexcept;

}  // namespace tq_hb

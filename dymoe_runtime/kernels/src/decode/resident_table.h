// A table of resident experts, in which decoding finds them without asking Python.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/moe.h"

namespace dymoe {

/// The resident experts of a model, and the rule that chooses the tiers of a token's experts. The store updates the
/// table when an expert arrives, leaves or moves.
class ResidentTable {
 public:
  /// Makes an empty table. The ladder is rising.
  ResidentTable(int64_t layers, int64_t experts, std::vector<int> ladder);

  /// Makes an expert resident at `tier`. It must stay in place until it is removed. Throws std::invalid_argument if it
  /// does not have the shape of the experts before it.
  void put(int64_t layer, int64_t number, int tier, const Expert* expert);

  /// Removes an expert at `tier`.
  void remove(int64_t layer, int64_t expert, int tier);

  /// Sets the rule of a layer, as in tier_rule.py: a threshold for each tier, highest tier first, and the experts that
  /// always run at the highest tier.
  void set_rule(int64_t layer, const std::vector<double>& thresholds, const std::vector<int64_t>& pinned);

  /// Chooses the tiers of a token's experts, which come highest weight first; 0 means skipped. The reference is
  /// `tiers_of_token` in tier_rule.py.
  void choose_tiers(int64_t layer, const int64_t* experts, const float* weights, int64_t count, int* tiers) const;

  /// Returns the expert at `tier`, or null if it is not resident there.
  const Expert* find(int64_t layer, int64_t expert, int tier) const;

  /// Returns whether the table is for a model of this shape.
  bool fits(int64_t layers, int64_t experts, int64_t hidden) const;

 private:
  const int64_t layers_, experts_;
  const std::vector<int> ladder_;
  int64_t hidden_ = 0, width_ = 0;               // shape of the experts; 0 before the first
  std::vector<const Expert*> resident_;          // [layers, experts, tiers]; null if not resident
  std::vector<std::vector<double>> thresholds_;  // [layers, tiers]; empty for a layer without a rule
  std::vector<std::vector<bool>> pinned_;        // [layers, experts]: always at the highest tier

  /// Returns the index in resident_. Throws std::invalid_argument for an unknown layer, expert or tier.
  int64_t index(int64_t layer, int64_t expert, int tier) const;
};

}  // namespace dymoe

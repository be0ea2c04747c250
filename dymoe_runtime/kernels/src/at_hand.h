// Which experts are in memory, for decoded tokens to find them.
#pragma once

#include <cstdint>
#include <vector>

#include "moe.h"

namespace dymoe {

/// Which experts are in memory, and the tiers that a token gives to those it chooses. Who keeps the books of memory
/// tells it of all that comes, leaves or moves.
class AtHand {
 public:
  /// All experts have the shape of the first one that is put here.
  AtHand(int64_t layers, int64_t experts, std::vector<int> ladder);

  /// `expert` must stay where it is until it is removed.
  void put(int64_t layer, int64_t number, int tier, const Expert* expert);
  void remove(int64_t layer, int64_t expert, int tier);

  /// As in policy.py: thresholds of a layer from the highest tier on, and the experts that always get that.
  void rule(int64_t layer, const std::vector<double>& thresholds, const std::vector<int64_t>& pinned);

  /// The tiers of the experts of a token, whose gates fall; 0 is skipped. `tiers_of_token` is the reference.
  void tiers(int64_t layer, const int64_t* experts, const float* gates, int64_t count, int* tiers) const;

  /// Null where it is not there.
  const Expert* find(int64_t layer, int64_t expert, int tier) const;

  /// Whether it is for such a model.
  bool fits(int64_t layers, int64_t experts, int64_t hidden) const;

 private:
  const int64_t layers_, experts_;
  const std::vector<int> ladder_;
  int64_t hidden_ = 0, width_ = 0;               // of the experts; 0 before the first
  std::vector<const Expert*> there_;             // [layers, experts, tiers], null where it is not
  std::vector<std::vector<double>> thresholds_;  // by layer
  std::vector<std::vector<bool>> pinned_;        // [layers, experts]

  int64_t place(int64_t layer, int64_t expert, int tier) const;
};

}  // namespace dymoe

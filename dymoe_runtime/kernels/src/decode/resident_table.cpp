#include "decode/resident_table.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace dymoe {

ResidentTable::ResidentTable(int64_t layers, int64_t experts, std::vector<int> ladder)
    : layers_(layers),
      experts_(experts),
      ladder_(std::move(ladder)),
      resident_(layers * experts * ladder_.size()),
      thresholds_(layers),
      pinned_(layers, std::vector<bool>(experts)) {}

int64_t ResidentTable::index(int64_t layer, int64_t expert, int tier) const {
  const auto rung = std::find(ladder_.begin(), ladder_.end(), tier);
  if (layer < 0 || layer >= layers_ || expert < 0 || expert >= experts_ || rung == ladder_.end())
    throw std::invalid_argument("there is no such expert");
  return (layer * experts_ + expert) * int64_t(ladder_.size()) + (rung - ladder_.begin());
}

void ResidentTable::put(int64_t layer, int64_t number, int tier, const Expert* expert) {
  const MatrixView& gate = expert->gate;
  if (!hidden_) hidden_ = gate.cols, width_ = gate.rows;
  if (gate.cols != hidden_ || gate.rows != width_) throw std::invalid_argument("experts: their shapes differ");
  resident_[index(layer, number, tier)] = expert;
}

void ResidentTable::remove(int64_t layer, int64_t expert, int tier) { resident_[index(layer, expert, tier)] = nullptr; }

const Expert* ResidentTable::find(int64_t layer, int64_t expert, int tier) const {
  return resident_[index(layer, expert, tier)];
}

bool ResidentTable::fits(int64_t layers, int64_t experts, int64_t hidden) const {
  return layers == layers_ && experts == experts_ && (!hidden_ || hidden == hidden_);
}

void ResidentTable::set_rule(int64_t layer, const std::vector<double>& thresholds, const std::vector<int64_t>& pinned) {
  if (layer < 0 || layer >= layers_ || thresholds.size() != ladder_.size())
    throw std::invalid_argument("a rule has a threshold for each tier");
  std::vector<bool> always(experts_);
  for (int64_t expert : pinned) {
    if (expert < 0 || expert >= experts_) throw std::invalid_argument("there is no such expert");
    always[expert] = true;
  }
  thresholds_[layer] = thresholds, pinned_[layer] = always;
}

void ResidentTable::choose_tiers(int64_t layer, const int64_t* experts, const float* weights, int64_t count,
                                 int* tiers) const {
  const std::vector<double>& thresholds = thresholds_.at(layer);
  const size_t rungs = ladder_.size();
  if (thresholds.empty()) throw std::invalid_argument("the layer has no rule");
  const bool all = *std::min_element(thresholds.begin(), thresholds.end()) >= 1;
  double total = 0;
  for (int64_t j = 0; j < count; ++j) total += weights[j];
  total = std::max(total, 1e-30);
  double upto = 0;
  size_t rung = 0;
  for (int64_t j = 0; j < count; ++j) {
    upto += weights[j];
    const double share = (upto - weights[j]) / total;
    while (!all && rung < rungs && !(share < thresholds[rung])) ++rung;
    tiers[j] = pinned_[layer].at(experts[j]) ? ladder_.back() : rung < rungs ? ladder_[rungs - 1 - rung] : 0;
  }
}

}  // namespace dymoe

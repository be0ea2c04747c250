#include "decode/stack.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "ops/workspace.h"

namespace dymoe {
namespace {

/// The experts that some tokens use in a layer, if all of them are resident.
struct Found {
  std::vector<LayerUse> uses;          // of each token
  std::vector<const Expert*> experts;  // [tokens, top_k]; null for a skipped expert
};

/// Finds the experts that tokens use in a layer. Returns nothing if not all of them are resident, if a token uses none,
/// or if the weights are not finite.
std::optional<Found> find_all(const ResidentTable& table, int64_t layer, int64_t tokens, const TokenBuffers& buffers,
                              int64_t top_k) {
  Found found;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t* experts = buffers.experts + t * top_k;
    const float* weights = buffers.weights + t * top_k;
    if (!std::isfinite(weights[0])) return {};
    LayerUse use{layer, {experts, experts + top_k}, std::vector<int>(top_k)};
    table.choose_tiers(layer, experts, weights, top_k, use.tiers.data());
    bool uses_none = true;
    for (int64_t j = 0; j < top_k; ++j) {
      found.experts.push_back(use.tiers[j] ? table.find(layer, experts[j], use.tiers[j]) : nullptr);
      if (!use.tiers[j]) continue;
      if (!found.experts.back()) return {};
      uses_none = false;
    }
    if (uses_none) return {};
    found.uses.push_back(std::move(use));
  }
  return found;
}

/// Runs the experts that tokens h [tokens, hidden] use, each once for all of them, and computes the weighted sums, out
/// [tokens, hidden].
void run_experts(const Kernels& isa, const Found& found, Activation activation, const float* h, const float* weights,
                 float* out) {
  thread_local Buffer<float> outputs;
  const int64_t tokens = int64_t(found.uses.size()), count = int64_t(found.experts.size()), top_k = count / tokens;
  std::vector<ExpertRows> parts;
  std::vector<int64_t> part_of(count, -1), rows(count, -1), of_row;
  std::vector<const Expert*> known;
  for (int64_t i = 0; i < count; ++i) {
    if (!found.experts[i]) continue;
    part_of[i] = std::find(known.begin(), known.end(), found.experts[i]) - known.begin();
    if (part_of[i] == int64_t(known.size())) {
      known.push_back(found.experts[i]);
      parts.push_back({*found.experts[i], 0, 0});
    }
    ++parts[part_of[i]].count;
  }
  for (size_t p = 1; p < parts.size(); ++p) parts[p].first = parts[p - 1].first + parts[p - 1].count;
  of_row.resize(parts.back().first + parts.back().count);
  std::vector<int64_t> next;
  for (const ExpertRows& part : parts) next.push_back(part.first);
  for (int64_t i = 0; i < count; ++i) {
    if (part_of[i] < 0) continue;
    rows[i] = next[part_of[i]]++;
    of_row[rows[i]] = i / top_k;
  }
  const int64_t hidden = parts[0].expert.gate.cols;
  float* y = outputs.reserve(int64_t(of_row.size()) * hidden);
  moe(isa, parts, h, of_row.data(), activation, y);
  combine(y, rows.data(), weights, tokens, top_k, hidden, out);
}

/// Throws std::invalid_argument unless a state fits the mixer of a layer.
void check(const LayerWeights& layer, const LayerState& state) {
  const auto* delta = std::get_if<DeltaLayer>(&layer.mixer);
  const auto* arrays = std::get_if<DeltaArrays>(&state);
  bool fits = delta ? arrays != nullptr : std::holds_alternative<LayerCache>(state);
  if (delta && arrays) {
    const DeltaShape& shape = delta->shape;
    fits = arrays->tail == (shape.taps - 1) * channels_of(shape) && arrays->memory == values_of(shape) * shape.key_dim;
  }
  if (!fits) throw std::invalid_argument("a state does not fit its layer");
}

}  // namespace

DecodeStack::DecodeStack(const Kernels& isa, std::vector<std::optional<LayerWeights>> layers, Activation activation)
    : isa_(isa), activation_(activation), layers_(std::move(layers)) {
  for (const std::optional<LayerWeights>& layer : layers_) {
    if (!layer) continue;
    check(*layer);
    if (hidden_ && layer->hidden != hidden_) throw std::invalid_argument("layers: their shapes differ");
    hidden_ = layer->hidden;
    if (const auto* attention = std::get_if<AttentionLayer>(&layer->mixer))
      rotations_ = std::max(rotations_, attention->rotation + 1);
  }
  if (!hidden_) throw std::invalid_argument("a model has at least one layer that is known");
}

bool DecodeStack::is_moe(int64_t layer) const {
  return layer >= 0 && layer < int64_t(layers_.size()) && layers_[layer] && layers_[layer]->moe();
}

void DecodeStack::set_states(std::vector<std::vector<LayerState>> sequences) {
  for (const std::vector<LayerState>& states : sequences) {
    if (states.size() != layers_.size()) throw std::invalid_argument("each layer has a state");
    for (size_t n = 0; n < states.size(); ++n)
      if (layers_[n]) check(*layers_[n], states[n]);
  }
  sequences_ = std::move(sequences);
}

void DecodeStack::check_run(const ResidentTable* table, int64_t first, bool finishes,
                            const std::vector<Position>& positions) const {
  const int64_t count = int64_t(layers_.size());
  if (positions.empty() || positions.size() != sequences_.size())
    throw std::invalid_argument("each sequence has one token");
  if (first < 0 || first > count || (first == count && !finishes))
    throw std::invalid_argument("there is no such layer");
  if (finishes && !is_moe(first - 1)) throw std::invalid_argument("there are no such experts to finish");
  for (size_t t = 0; t < positions.size(); ++t) {
    const Position& position = positions[t];
    if (position.index < 0 || int64_t(position.rotations.size()) < rotations_)
      throw std::invalid_argument("there is no such position, or a rotary embedding is missing");
    for (int64_t n = 0; n < count; ++n) {
      const auto* cache = layers_[n] ? std::get_if<LayerCache>(&sequences_[t][n]) : nullptr;
      if (cache && position.index >= cache->capacity) throw std::invalid_argument("the cache has no such position");
    }
  }
  for (const std::optional<LayerWeights>& layer : layers_)
    if (layer && layer->moe() && table && !table->fits(count, layer->moe()->rule.experts, hidden_))
      throw std::invalid_argument("the experts are of another model");
}

Reached DecodeStack::run(const ResidentTable* table, int64_t first, const float* x, const float* more,
                         const std::vector<Position>& positions, const TokenBuffers& buffers) const {
  check_run(table, first, more != nullptr, positions);
  thread_local Buffer<float> sums;
  const int64_t tokens = int64_t(positions.size());
  float* residual = buffers.residual;
  if (more) {
    finish_tokens(isa_, *layers_[first - 1], activation_, tokens, x, more, residual);
  } else if (x != residual) {
    std::copy(x, x + tokens * hidden_, residual);
  }
  Reached reached{first, true, 0, {}};
  for (int64_t& n = reached.layer; n < int64_t(layers_.size()); ++n) {
    if (!layers_[n]) {
      reached.attended = false;
      return reached;
    }
    const LayerWeights& layer = *layers_[n];
    const MoeLayer* moe = layer.moe();
    const auto choose = [&] {
      route_tokens(isa_, layer, tokens, residual, buffers.h, buffers.experts, buffers.weights);
    };
    if (moe && layer.parallel) choose();
    mix_tokens(isa_, layer, activation_, {tokens, positions.data(), sequences_.data(), n}, residual, residual);
    if (!moe) {
      if (!layer.parallel) feed_tokens(isa_, layer, activation_, tokens, residual, residual);
      continue;
    }
    if (!layer.parallel) choose();
    std::optional<Found> found;
    if (table) found = find_all(*table, n, tokens, buffers, moe->rule.top_k);
    if (!found) {
      reached.chosen = moe->rule.top_k;
      return reached;
    }
    float* sum = sums.reserve(tokens * hidden_);
    run_experts(isa_, *found, activation_, buffers.h, buffers.weights, sum);
    finish_tokens(isa_, layer, activation_, tokens, residual, sum, residual);
    for (LayerUse& use : found->uses) reached.used.push_back(std::move(use));
  }
  return reached;
}

void DecodeStack::route(int64_t layer, const Router* other, const float* x, int64_t* experts, float* weights) const {
  if (!is_moe(layer)) throw std::invalid_argument("this layer has no router");
  guess_token(isa_, *layers_[layer], other, x, experts, weights);
}

}  // namespace dymoe

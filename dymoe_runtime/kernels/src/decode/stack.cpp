#include "decode/stack.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "ops/workspace.h"

namespace dymoe {
namespace {

/// The experts that a token uses in a layer, if all of them are resident.
struct Found {
  LayerUse use;
  std::vector<const Expert*> experts;
  std::vector<float> weights;
};

/// Finds the experts that the token uses in a layer. Returns nothing if not all of them are resident, if none is used,
/// or if the weights are not finite.
std::optional<Found> find_all(const ResidentTable& table, int64_t layer, const TokenBuffers& token, int64_t top_k) {
  if (!std::isfinite(token.weights[0])) return {};
  Found found{{layer, {token.experts, token.experts + top_k}, std::vector<int>(top_k)}, {}, {}};
  table.choose_tiers(layer, token.experts, token.weights, top_k, found.use.tiers.data());
  for (int64_t j = 0; j < top_k; ++j) {
    if (!found.use.tiers[j]) continue;
    found.experts.push_back(table.find(layer, token.experts[j], found.use.tiers[j]));
    if (!found.experts.back()) return {};
    found.weights.push_back(token.weights[j]);
  }
  if (found.experts.empty()) return {};
  return found;
}

/// Runs the experts that a token uses, and computes their weighted sum, out [hidden].
void run_experts(const Kernels& isa, const Found& found, Activation activation, const float* h, float* out) {
  std::vector<int64_t> ranks(found.experts.size());
  std::iota(ranks.begin(), ranks.end(), 0);
  TokenMoe token(isa, found.experts, h, activation);
  token.run(ranks);
  token.combine(found.weights.data(), out);
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

void DecodeStack::set_states(std::vector<LayerState> states) {
  if (states.size() != layers_.size()) throw std::invalid_argument("each layer has a state");
  for (size_t n = 0; n < states.size(); ++n)
    if (layers_[n]) check(*layers_[n], states[n]);
  states_ = std::move(states);
}

void DecodeStack::check_run(const ResidentTable* table, int64_t first, bool finishes, const Position& position) const {
  const int64_t count = int64_t(layers_.size());
  if (first < 0 || first > count || (first == count && !finishes) || states_.empty())
    throw std::invalid_argument("there is no such layer, or no state");
  if (finishes && !is_moe(first - 1)) throw std::invalid_argument("there are no such experts to finish");
  if (position.index < 0 || int64_t(position.rotations.size()) < rotations_)
    throw std::invalid_argument("there is no such position, or a rotary embedding is missing");
  for (int64_t n = 0; n < count; ++n) {
    if (!layers_[n]) continue;
    if (const auto* cache = std::get_if<LayerCache>(&states_[n]); cache && position.index >= cache->capacity)
      throw std::invalid_argument("the cache has no such position");
    if (const MoeLayer* moe = layers_[n]->moe(); moe && table && !table->fits(count, moe->rule.experts, hidden_))
      throw std::invalid_argument("the experts are of another model");
  }
}

Reached DecodeStack::run(const ResidentTable* table, int64_t first, const float* x, const float* more,
                         const Position& position, const TokenBuffers& buffers) const {
  check_run(table, first, more != nullptr, position);
  thread_local Buffer<float> sum;
  float* residual = buffers.residual;
  if (more) {
    finish_token(isa_, *layers_[first - 1], activation_, x, more, residual);
  } else if (x != residual) {
    std::copy(x, x + hidden_, residual);
  }
  Reached reached{first, true, 0, {}};
  for (int64_t& n = reached.layer; n < int64_t(layers_.size()); ++n) {
    if (!layers_[n]) {
      reached.attended = false;
      return reached;
    }
    const LayerWeights& layer = *layers_[n];
    const MoeLayer* moe = layer.moe();
    const auto choose = [&] { route_token(isa_, layer, residual, buffers.h, buffers.experts, buffers.weights); };
    if (moe && layer.parallel) choose();
    mix_token(isa_, layer, activation_, residual, position, states_[n], residual);
    if (!moe) {
      if (!layer.parallel) feed_token(isa_, layer, activation_, residual, residual);
      continue;
    }
    if (!layer.parallel) choose();
    std::optional<Found> found;
    if (table) found = find_all(*table, n, buffers, moe->rule.top_k);
    if (!found) {
      reached.chosen = moe->rule.top_k;
      return reached;
    }
    run_experts(isa_, *found, activation_, buffers.h, sum.reserve(hidden_));
    finish_token(isa_, layer, activation_, residual, sum.reserve(hidden_), residual);
    reached.used.push_back(std::move(found->use));
  }
  return reached;
}

void DecodeStack::route(int64_t layer, const Router* other, const float* x, int64_t* experts, float* weights) const {
  if (!is_moe(layer)) throw std::invalid_argument("this layer has no router");
  guess_token(isa_, *layers_[layer], other, x, experts, weights);
}

}  // namespace dymoe

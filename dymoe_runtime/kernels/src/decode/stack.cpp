#include "decode/stack.h"

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

/// Computes out = x + more, or x if `more` is null, [n].
void add(int64_t n, const float* x, const float* more, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = more ? x[i] + more[i] : x[i];
}

}  // namespace

DecodeStack::DecodeStack(const Kernels& isa, std::vector<std::optional<LayerWeights>> layers, Activation activation)
    : isa_(isa), activation_(activation), layers_(std::move(layers)) {
  const LayerWeights* first = nullptr;
  for (const std::optional<LayerWeights>& layer : layers_) {
    if (!layer) continue;
    check(*layer);
    if (!first) first = &*layer;
    if (layer->hidden != first->hidden) throw std::invalid_argument("layers: their shapes differ");
  }
  if (!first) throw std::invalid_argument("a model has at least one layer that is known");
}

int64_t DecodeStack::hidden() const {
  for (const std::optional<LayerWeights>& layer : layers_)
    if (layer) return layer->hidden;
  return 0;
}

void DecodeStack::set_caches(std::vector<LayerCache> caches) {
  if (caches.size() != layers_.size()) throw std::invalid_argument("a cache has its rows for each layer");
  caches_ = std::move(caches);
}

Reached DecodeStack::run(const ResidentTable* table, int64_t first, const float* x, const float* more,
                         const Position& position, const TokenBuffers& buffers) const {
  const int64_t count = int64_t(layers_.size());
  if (first < 0 || first >= count || caches_.empty())
    throw std::invalid_argument("there is no such layer, or no cache");
  for (int64_t n = 0; n < count; ++n) {
    if (!layers_[n]) continue;
    if (position.index < 0 || position.index >= caches_[n].capacity)
      throw std::invalid_argument("the cache has no such position");
    if (table && layers_[n]->experts && !table->fits(count, layers_[n]->experts, layers_[n]->hidden))
      throw std::invalid_argument("the experts are of another model");
  }
  thread_local Buffer<float> sum;
  Reached reached{first, true, 0, {}};
  for (int64_t& n = reached.layer; n < count; ++n) {
    if (!layers_[n]) {
      add(hidden(), x, more, buffers.residual);
      reached.attended = false;
      return reached;
    }
    const LayerWeights& layer = *layers_[n];
    attend_token(isa_, layer, x, more, position, caches_[n], buffers.residual);
    if (!layer.experts) return reached;
    route_token(isa_, layer, layer.router, buffers.residual, buffers.h, buffers.experts, buffers.weights);
    std::optional<Found> found;
    if (table) found = find_all(*table, n, buffers, layer.top_k);
    if (!found) {
      reached.chosen = layer.top_k;
      return reached;
    }
    std::vector<int64_t> ranks(found->experts.size());
    std::iota(ranks.begin(), ranks.end(), 0);
    TokenMoe token(isa_, found->experts, buffers.h, activation_);
    token.run(ranks);
    token.combine(found->weights.data(), sum.reserve(layer.hidden));
    reached.used.push_back(std::move(found->use));
    x = buffers.residual, more = sum.reserve(layer.hidden);
  }
  add(hidden(), x, more, buffers.residual);
  return reached;
}

void DecodeStack::route(int64_t layer, const Router* other, const float* x, float* h, int64_t* experts,
                        float* weights) const {
  if (layer < 0 || layer >= int64_t(layers_.size()) || !layers_[layer] || !layers_[layer]->experts)
    throw std::invalid_argument("this layer has no router");
  const LayerWeights& known = *layers_[layer];
  route_token(isa_, known, other ? *other : known.router, x, h, experts, weights);
}

}  // namespace dymoe

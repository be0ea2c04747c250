#include "step.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops.h"
#include "workspace.h"

namespace dymoe {
namespace {

struct Workspace {
  QuantizedTokens quantized;
  Buffer<float> residual, h, heads, attended, scores, logits, sum;
};

thread_local Workspace workspace;

/// Products of one quantized token, one after another in y.
void multiply(const Kernels& isa, const Activations& a, std::initializer_list<const Linear*> weights, float* y) {
  struct Item {
    const Linear* linear;
    int64_t begin, end;
    float* y;
  };
  std::vector<Item> items;
  int64_t work = 0;
  for (const Linear* linear : weights) {
    const MatrixView& m = linear->weight;
    const int64_t chunk = round_up(std::max<int64_t>(1, m.rows / (threads() * kChunksPerThread)), kRowMultiple);
    for (int64_t begin = 0; begin < m.rows; begin += chunk)
      items.push_back({linear, begin, std::min(m.rows, begin + chunk), y});
    y += m.rows;
    work += m.rows * m.blocks;
  }
  auto body = [&](int64_t i) {
    const Item& item = items[i];
    const MatrixView& m = item.linear->weight;
    isa.product(m, a, item.begin, item.end, item.y, m.rows, scratch_for(m));
    if (const float* bias = item.linear->bias)
      for (int64_t r = item.begin; r < item.end; ++r) item.y[r] += bias[r];
  };
  if (work < kSmallWork) {
    for (size_t i = 0; i < items.size(); ++i) body(int64_t(i));
  } else {
    parallel_for(int64_t(items.size()), body);
  }
}

/// Norm, if the model has one here, and clip of queries or keys [heads, head_dim].
void finish(const Kernels& isa, const LayerWeights& layer, const float* weight, int64_t heads, float* x) {
  const int64_t n = heads * layer.head_dim;
  if (layer.qk_norm == QkNorm::full) isa.norm(x, weight, n, layer.eps, x);
  if (layer.clip > 0.0f)
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] < -layer.clip ? -layer.clip : x[i] > layer.clip ? layer.clip : x[i];
  if (layer.qk_norm == QkNorm::head)
    for (int64_t i = 0; i < n; i += layer.head_dim) isa.norm(x + i, weight, layer.head_dim, layer.eps, x + i);
}

}  // namespace

void attend(const Kernels& isa, const LayerWeights& layer, const float* x, const float* more, int64_t position,
            const float* cosines, const float* sines, const LayerCache& cache, float* out) {
  const int64_t d = layer.head_dim, queries = layer.heads * d, keys = layer.kv_heads * d;
  float* h = workspace.h.reserve(layer.hidden);
  float* q = workspace.heads.reserve(queries + 2 * keys);
  float *k = q + queries, *v = k + keys;
  float* residual = workspace.residual.reserve(layer.hidden);
  for (int64_t i = 0; i < layer.hidden; ++i) residual[i] = more ? x[i] + more[i] : x[i];
  isa.norm(residual, layer.attn_norm, layer.hidden, layer.eps, h);
  multiply(isa, workspace.quantized.quantize(isa, 1, layer.hidden, [&](int64_t) { return h; }),
           {&layer.q, &layer.k, &layer.v}, q);
  finish(isa, layer, layer.q_norm, layer.heads, q);
  finish(isa, layer, layer.k_norm, layer.kv_heads, k);
  if (layer.clip > 0.0f)
    for (int64_t i = 0; i < keys; ++i) v[i] = v[i] < -layer.clip ? -layer.clip : v[i] > layer.clip ? layer.clip : v[i];
  rotate(q, 1, layer.heads, d, cosines, sines);
  rotate(k, 1, layer.kv_heads, d, cosines, sines);
  append(isa, {1, layer.heads, layer.kv_heads, d, position, layer.window, 0}, k, v, cache);

  const int64_t first = layer.window ? std::max<int64_t>(0, position + 1 - layer.window) : 0;
  const int64_t count = position + 1 - first, group = layer.heads / layer.kv_heads;
  float* attended = workspace.attended.reserve(queries);
  float* scores = workspace.scores.reserve(layer.heads * count);
  parallel_ranges(layer.kv_heads, 1, layer.heads * count * d / kBlock * kFloatWork, [&](int64_t begin, int64_t end) {
    thread_local Buffer<float> rows;
    for (int64_t g = begin; g < end; ++g)
      isa.attend(q + g * group * d, group, rows_from(cache, g, first, d), count, d, scores + g * group * count,
                 rows.reserve(kCacheRows * d), attended + g * group * d);
  });
  multiply(isa, workspace.quantized.quantize(isa, 1, queries, [&](int64_t) { return attended; }), {&layer.o}, out);
  for (int64_t i = 0; i < layer.hidden; ++i) out[i] = residual[i] + out[i];
}

void choose(const Kernels& isa, float* logits, int64_t count, int64_t top_k, bool norm_topk, int64_t* experts,
            float* gates) {
  const float sum = isa.exponentials(logits, count);
  if (!std::isfinite(sum)) {  // nothing can be compared; what follows is as spoilt
    for (int64_t j = 0; j < top_k; ++j) experts[j] = j, gates[j] = NAN;
    return;
  }
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int64_t a, int64_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  });
  float mass = 0.0f;
  for (int64_t j = 0; j < top_k; ++j) {
    experts[j] = order[j];
    gates[j] = logits[order[j]] / sum;
    mass += gates[j];
  }
  if (norm_topk)
    for (int64_t j = 0; j < top_k; ++j) gates[j] /= mass;
}

void route(const Kernels& isa, const LayerWeights& layer, const Router& router, const float* x, float* h,
           int64_t* experts, float* gates) {
  isa.norm(x, layer.mlp_norm, layer.hidden, layer.eps, h);
  float* logits = workspace.logits.reserve(layer.experts);
  parallel_ranges(layer.experts, 1, layer.experts * layer.hidden / kBlock, [&](int64_t begin, int64_t end) {
    isa.dots(router.weight, layer.hidden, begin, end, h, logits);
  });
  if (router.bias)
    for (int64_t e = 0; e < layer.experts; ++e) logits[e] += router.bias[e];
  choose(isa, logits, layer.experts, layer.top_k, layer.norm_topk, experts, gates);
}

namespace {

/// What the token uses of a layer with these experts and gates; false where not all of that is at hand, or nothing is
/// used, or the gates are no numbers.
bool find_all(const AtHand& at_hand, int64_t layer, const TokenState& state, int64_t top_k, Used& used,
              std::vector<const Expert*>& found, std::vector<float>& gates) {
  if (!std::isfinite(state.gates[0])) return false;
  used = {layer, {state.experts, state.experts + top_k}, std::vector<int>(top_k)};
  at_hand.tiers(layer, state.experts, state.gates, top_k, used.tiers.data());
  for (int64_t j = 0; j < top_k; ++j) {
    if (!used.tiers[j]) continue;
    found.push_back(at_hand.find(layer, state.experts[j], used.tiers[j]));
    if (!found.back()) return false;
    gates.push_back(state.gates[j]);
  }
  return !found.empty();
}

}  // namespace

int64_t run_layers(const Kernels& isa, const std::vector<LayerWeights>& layers, const std::vector<LayerCache>& caches,
                   const AtHand* at_hand, Activation activation, int64_t first, const float* x, const float* more,
                   int64_t position, const float* cosines, const float* sines, const TokenState& state,
                   std::vector<Used>& used) {
  for (int64_t n = first; n < int64_t(layers.size()); ++n) {
    const LayerWeights& layer = layers[n];
    attend(isa, layer, x, more, position, cosines, sines, caches[n], state.out);
    if (!layer.experts) return n;
    route(isa, layer, {layer.router, nullptr}, state.out, state.h, state.experts, state.gates);
    Used now;
    std::vector<const Expert*> found;
    std::vector<float> gates;
    if (!at_hand || !find_all(*at_hand, n, state, layer.top_k, now, found, gates)) return n;
    std::vector<int64_t> ranks(found.size());
    std::iota(ranks.begin(), ranks.end(), 0);
    TokenMoe token(isa, found, state.h, activation);
    token.run(ranks);
    float* sum = workspace.sum.reserve(layer.hidden);
    token.combine(gates.data(), sum);
    used.push_back(std::move(now));
    x = state.out, more = sum;
  }
  for (int64_t i = 0; i < layers.back().hidden; ++i) state.out[i] += more[i];
  return int64_t(layers.size());
}

}  // namespace dymoe

// Checks a decoded token through whole layers: DecodeStack and ResidentTable against the operations one by one.
#pragma once

#include <cmath>
#include <optional>
#include <set>

#include "check.h"
#include "decode/stack.h"
#include "ops/attention.h"
#include "ops/moe.h"
#include "ops/ops.h"
#include "ops/router.h"
#include "threads/pool.h"

namespace dymoe {
namespace {

struct LayerShape {
  int64_t heads, kv_heads, head_dim, window, top_k;
  float clip;
  QkNorm qk_norm;
  bool normalize, biased;
  int kv_bits;
};

/// The random dense weights of a layer, and its cache.
struct Layer {
  std::vector<Matrix> matrices;                   // q, k, v and o
  std::vector<std::unique_ptr<float[]>> vectors;  // norms, biases, router
  LayerWeights weights{};
  std::unique_ptr<uint8_t[]> keys, values;
  int64_t cache_bytes;
  LayerCache cache;

  Layer(int64_t hidden, int64_t experts, const LayerShape& s, int64_t capacity) {
    const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    LayerWeights& w = weights;
    w.hidden = hidden, w.heads = s.heads, w.kv_heads = s.kv_heads, w.head_dim = s.head_dim;
    w.window = s.window, w.experts = experts, w.top_k = s.top_k, w.normalize = s.normalize;
    w.eps = 1e-5f, w.clip = s.clip, w.qk_norm = s.qk_norm;
    const int64_t shapes[][2] = {{q, hidden}, {kv, hidden}, {kv, hidden}, {hidden, q}};
    Linear* const linears[] = {&w.q, &w.k, &w.v, &w.o};
    constexpr uint16_t kMultiplier = 0x3880;  // 2^-14: outputs about as large as inputs
    for (int i = 0; i < 4; ++i) {
      matrices.emplace_back(shapes[i][0], shapes[i][1], std::vector<int>{8}, 8, kMultiplier);
      *linears[i] = {matrices.back().view, s.biased ? random_vector(shapes[i][0]) : nullptr};
    }
    w.attn_norm = random_vector(hidden), w.mlp_norm = random_vector(hidden);
    if (s.qk_norm != QkNorm::none) {
      w.q_norm = random_vector(s.qk_norm == QkNorm::head ? s.head_dim : q);
      w.k_norm = random_vector(s.qk_norm == QkNorm::head ? s.head_dim : kv);
    }
    w.router = {random_vector(experts * hidden), nullptr};
    cache_bytes = s.kv_heads * capacity * cache_row_bytes(s.head_dim, s.kv_bits);
    keys = buffer<uint8_t>(cache_bytes), values = buffer<uint8_t>(cache_bytes);
    std::memset(keys.get(), 0, cache_bytes), std::memset(values.get(), 0, cache_bytes);
    cache = {keys.get(), values.get(), capacity, s.kv_bits};
  }

  const float* random_vector(int64_t count) {
    const std::vector<float> values = random_floats(count);
    vectors.push_back(buffer<float>(count));
    std::copy(values.begin(), values.end(), vectors.back().get());
    return vectors.back().get();
  }
};

/// A cache of the same shape as that of a layer, for the operations one by one.
struct OtherCache {
  std::unique_ptr<uint8_t[]> keys, values;
  LayerCache view;

  explicit OtherCache(const Layer& layer)
      : keys(buffer<uint8_t>(layer.cache_bytes)), values(buffer<uint8_t>(layer.cache_bytes)), view(layer.cache) {
    std::memset(keys.get(), 0, layer.cache_bytes), std::memset(values.get(), 0, layer.cache_bytes);
    view.keys = keys.get(), view.values = values.get();
  }

  bool equals(const Layer& layer) const {
    return !std::memcmp(keys.get(), layer.keys.get(), layer.cache_bytes) &&
           !std::memcmp(values.get(), layer.values.get(), layer.cache_bytes);
  }
};

constexpr int64_t kExperts = 5;
const std::vector<int> kLadder = {2, 4};
constexpr int64_t kCapacity = 7;

/// A model whose experts are all resident. Layer l has as its expert e number (e + l) % kExperts of `experts`.
struct Model {
  int64_t hidden, width;
  std::vector<LayerShape> shapes;
  std::vector<Layer> layers;
  std::vector<ExpertMatrices> low, high;  // at tier 2 and at tier 4
  std::vector<double> thresholds;
  std::vector<int64_t> pinned;  // in each layer
  ResidentTable table;

  Model(int64_t hidden_size, int64_t expert_width, std::vector<LayerShape> of_layers)
      : hidden(hidden_size),
        width(expert_width),
        shapes(std::move(of_layers)),
        thresholds{0.3, 0.75},
        pinned{3},
        table(int64_t(shapes.size()), kExperts, kLadder) {
    for (const LayerShape& shape : shapes) layers.emplace_back(hidden, kExperts, shape, kCapacity);
    for (int64_t e = 0; e < kExperts; ++e) {
      low.emplace_back(hidden, width, std::vector<int>{2}, 4);
      high.emplace_back(hidden, width, std::vector<int>{2, 1, 1}, 4);
    }
    for (int64_t l = 0; l < int64_t(layers.size()); ++l) {
      table.set_rule(l, thresholds, pinned);
      for (int64_t e = 0; e < kExperts; ++e)
        for (int tier : kLadder) table.put(l, e, tier, &expert(l, e, tier));
    }
  }

  const Expert& expert(int64_t layer, int64_t e, int tier) const {
    return (tier == 2 ? low : high)[(e + layer) % kExperts].view;
  }

  DecodeStack stack(const Kernels& isa, const std::vector<bool>& unknown = {}) const {
    std::vector<std::optional<LayerWeights>> known;
    for (size_t l = 0; l < layers.size(); ++l) {
      known.emplace_back();
      if (unknown.empty() || !unknown[l]) known.back() = layers[l].weights;
    }
    DecodeStack stack(isa, known, Activation::silu);
    stack.set_caches(caches());
    return stack;
  }

  std::vector<LayerCache> caches() const {
    std::vector<LayerCache> views;
    for (const Layer& layer : layers) views.push_back(layer.cache);
    return views;
  }
};

/// The angles of a position, in buffers of their own.
struct Angles {
  std::unique_ptr<float[]> cosines, sines;
  Position position;

  Angles(int64_t index, int64_t head_dim) : cosines(buffer<float>(head_dim)), sines(buffer<float>(head_dim)) {
    for (int64_t i = 0; i < head_dim; ++i) {
      const float angle = float(index) / float(1 + i % (head_dim / 2));
      cosines[i] = std::cos(angle), sines[i] = std::sin(angle);
    }
    position = {index, cosines.get(), sines.get()};
  }
};

/// What the operations one by one make of a token in one layer.
struct PlainLayer {
  std::vector<float> in, residual, h, weights, sum;  // before the layer, after attention; what its experts add
  std::vector<int64_t> experts;
  std::vector<int> tiers;
};

std::vector<float> plain_linear(const Kernels& isa, const Linear& m, const std::vector<float>& x) {
  std::vector<float> y(m.weight.rows);
  linear(isa, m.weight, x.data(), 1, y.data());
  if (m.bias)
    for (size_t i = 0; i < y.size(); ++i) y[i] += m.bias[i];
  return y;
}

std::vector<float> plain_norm(const Kernels& isa, const std::vector<float>& x, const float* weight, int64_t n) {
  std::vector<float> y(x.size());
  norms(isa, x.data(), weight, int64_t(x.size()) / n, n, 1e-5f, y.data());
  return y;
}

std::vector<float> added(const std::vector<float>& a, const std::vector<float>& b) {
  std::vector<float> sum(a.size());
  for (size_t i = 0; i < a.size(); ++i) sum[i] = a[i] + b[i];
  return sum;
}

void plain_clip(float limit, std::vector<float>& x) {
  if (limit > 0.0f)
    for (float& value : x) value = std::min(std::max(value, -limit), limit);
}

/// Attention of queries [heads, head_dim] over all that the token sees; that of a prompt of one token is close to it.
std::vector<float> plain_attend(const Kernels& isa, const LayerWeights& w, const std::vector<float>& q, int64_t index,
                                const LayerCache& cache) {
  const int64_t d = w.head_dim, group = w.heads / w.kv_heads;
  const int64_t first = w.window ? std::max<int64_t>(0, index + 1 - w.window) : 0, count = index + 1 - first;
  std::vector<float> out(q.size()), prompt(q.size());
  for (int64_t g = 0; g < w.kv_heads; ++g) {
    const auto scores = buffer<float>(group * count), rows = buffer<float>(kCacheRows * d);
    isa.attend(q.data() + g * group * d, group, rows_from(cache, g, first, d), count, d, scores.get(), rows.get(),
               out.data() + g * group * d);
  }
  attend_prompt(isa, {1, w.heads, w.kv_heads, d, index, w.window, 0}, q.data(), cache, prompt.data(), nullptr);
  expect(is_close(out, prompt), isa.name, "attention of a token, as of a prompt");
  return out;
}

/// The residual stream after the attention of a layer.
std::vector<float> plain_attention(const Kernels& isa, const LayerWeights& w, const std::vector<float>& x,
                                   const Position& position, const LayerCache& cache) {
  const std::vector<float> h = plain_norm(isa, x, w.attn_norm, w.hidden);
  std::vector<float> q = plain_linear(isa, w.q, h), k = plain_linear(isa, w.k, h), v = plain_linear(isa, w.v, h);
  if (w.qk_norm == QkNorm::full) {
    q = plain_norm(isa, q, w.q_norm, int64_t(q.size()));
    k = plain_norm(isa, k, w.k_norm, int64_t(k.size()));
  }
  for (std::vector<float>* vector : {&q, &k, &v}) plain_clip(w.clip, *vector);
  if (w.qk_norm == QkNorm::head) {
    q = plain_norm(isa, q, w.q_norm, w.head_dim);
    k = plain_norm(isa, k, w.k_norm, w.head_dim);
  }
  rotate(q.data(), 1, w.heads, w.head_dim, position.cosines, position.sines);
  rotate(k.data(), 1, w.kv_heads, w.head_dim, position.cosines, position.sines);
  append(isa, {1, w.heads, w.kv_heads, w.head_dim, position.index, w.window, 0}, k.data(), v.data(), cache);
  return added(x, plain_linear(isa, w.o, plain_attend(isa, w, q, position.index, cache)));
}

void plain_route(const Kernels& isa, const LayerWeights& w, const Router& router, PlainLayer& layer) {
  layer.h = plain_norm(isa, layer.residual, w.mlp_norm, w.hidden);
  std::vector<float> logits(w.experts);
  matmul(isa, router.weight, false, w.experts, w.hidden, layer.h.data(), 1, logits.data());
  if (router.bias)
    for (int64_t e = 0; e < w.experts; ++e) logits[e] += router.bias[e];
  layer.experts.resize(w.top_k), layer.weights.resize(w.top_k);
  select_experts(isa, logits.data(), w.experts, w.top_k, w.normalize, layer.experts.data(), layer.weights.data());
}

/// The tiers of a token's experts: the highest whose threshold exceeds the share of weight before it.
std::vector<int> plain_tiers(const Model& model, const PlainLayer& layer) {
  double total = 0, before = 0;
  for (float weight : layer.weights) total += weight;
  std::vector<int> tiers;
  for (size_t j = 0; j < layer.experts.size(); ++j) {
    const double share = before / total;
    const bool is_pinned = std::count(model.pinned.begin(), model.pinned.end(), layer.experts[j]) > 0;
    tiers.push_back(is_pinned || share < model.thresholds[0] ? 4 : share < model.thresholds[1] ? 2 : 0);
    before += layer.weights[j];
  }
  return tiers;
}

/// What the experts that a token uses add, as a call of many experts and their sum.
std::vector<float> plain_experts(const Kernels& isa, const Model& model, int64_t number, const PlainLayer& layer) {
  std::vector<ExpertRows> parts;
  std::vector<int64_t> tokens, rows;
  for (size_t j = 0; j < layer.experts.size(); ++j) {
    rows.push_back(layer.tiers[j] ? int64_t(parts.size()) : -1);
    if (!layer.tiers[j]) continue;
    parts.push_back({model.expert(number, layer.experts[j], layer.tiers[j]), rows.back(), 1});
    tokens.push_back(0);
  }
  std::vector<float> y(parts.size() * model.hidden), sum(model.hidden);
  moe(isa, parts, layer.h.data(), tokens.data(), Activation::silu, y.data());
  combine(y.data(), rows.data(), layer.weights.data(), 1, int64_t(rows.size()), model.hidden, sum.data());
  return sum;
}

std::vector<PlainLayer> plain_run(const Kernels& isa, const Model& model, std::vector<float> x,
                                  const Position& position, const std::vector<OtherCache>& caches) {
  std::vector<PlainLayer> layers(model.layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    PlainLayer& layer = layers[l];
    const LayerWeights& w = model.layers[l].weights;
    layer.in = x;
    layer.residual = plain_attention(isa, w, x, position, caches[l].view);
    plain_route(isa, w, w.router, layer);
    layer.tiers = plain_tiers(model, layer);
    layer.sum = plain_experts(isa, model, int64_t(l), layer);
    x = added(layer.residual, layer.sum);
  }
  return layers;
}

/// Buffers that a stack writes to.
struct Buffers {
  std::unique_ptr<float[]> residual, h, weights;
  std::unique_ptr<int64_t[]> experts;
  int64_t hidden, top_k;

  explicit Buffers(const Model& model, int64_t most_experts = 3)
      : residual(buffer<float>(model.hidden)),
        h(buffer<float>(model.hidden)),
        weights(buffer<float>(most_experts)),
        experts(buffer<int64_t>(most_experts)),
        hidden(model.hidden),
        top_k(most_experts) {}

  TokenBuffers view() const { return {residual.get(), h.get(), experts.get(), weights.get()}; }

  bool has_residual(const std::vector<float>& expected) const {
    return std::equal(expected.begin(), expected.end(), residual.get());
  }

  /// Whether they have what the router of a layer was asked with, and what it chose.
  bool has_routed(const PlainLayer& layer) const {
    return has_residual(layer.residual) && std::equal(layer.h.begin(), layer.h.end(), h.get()) &&
           std::equal(layer.experts.begin(), layer.experts.end(), experts.get()) &&
           std::equal(layer.weights.begin(), layer.weights.end(), weights.get());
  }
};

bool is_at(const Reached& reached, int64_t layer, bool attended, int64_t chosen) {
  return reached.layer == layer && reached.attended == attended && reached.chosen == chosen;
}

/// Whether the layers from `first` up to the one reached are told as used, and no others.
bool told(const Reached& reached, const std::vector<PlainLayer>& plain, int64_t first) {
  if (int64_t(reached.used.size()) != reached.layer - first) return false;
  for (size_t i = 0; i < reached.used.size(); ++i) {
    const LayerUse& use = reached.used[i];
    const PlainLayer& layer = plain[first + int64_t(i)];
    if (use.layer != first + int64_t(i) || use.experts != layer.experts || use.tiers != layer.tiers) return false;
  }
  return true;
}

/// One token through all layers, and through parts of them, of which all else is the caller's.
void check_token_in_stack(const Kernels& isa, Model& model, const std::vector<float>& x, const Position& position,
                          const std::vector<PlainLayer>& plain) {
  const int64_t count = int64_t(plain.size()), last = count - 1;
  const std::string at = " at position " + std::to_string(position.index);
  const DecodeStack stack = model.stack(isa);
  const Buffers token(model);
  Reached reached = stack.run(&model.table, 0, x.data(), nullptr, position, token.view());
  const std::vector<float> end = added(plain[last].residual, plain[last].sum);
  expect(is_at(reached, count, true, 0) && token.has_residual(end) && told(reached, plain, 0), isa.name,
         "a token through all layers" + at);

  // In the same buffer, and with something to add.
  const Buffers same(model);
  std::copy(plain[0].residual.begin(), plain[0].residual.end(), same.residual.get());
  reached = stack.run(&model.table, 1, same.residual.get(), plain[0].sum.data(), position, same.view());
  expect(is_at(reached, count, true, 0) && same.has_residual(end) && told(reached, plain, 1), isa.name,
         "a token from the second layer on" + at);

  const Buffers alone(model);
  reached = stack.run(nullptr, 1, plain[1].in.data(), nullptr, position, alone.view());
  expect(is_at(reached, 1, true, model.layers[1].weights.top_k) && alone.has_routed(plain[1]) && reached.used.empty(),
         isa.name, "a token through one layer" + at);

  // The last expert that the last layer uses is not resident.
  size_t rank = plain[last].experts.size() - 1;
  while (!plain[last].tiers[rank]) --rank;
  const int64_t missing = plain[last].experts[rank];
  const int tier = plain[last].tiers[rank];
  const Buffers stopped(model);
  model.table.remove(last, missing, tier);
  reached = stack.run(&model.table, 0, x.data(), nullptr, position, stopped.view());
  model.table.put(last, missing, tier, &model.expert(last, missing, tier));
  expect(is_at(reached, last, true, model.layers[last].weights.top_k) && stopped.has_routed(plain[last]) &&
             told(reached, plain, 0),
         isa.name, "a token up to an expert that is not resident" + at);

  // A layer that uses no expert at all is the caller's too.
  model.table.set_rule(1, {0.0, 0.0}, {});
  reached = stack.run(&model.table, 0, x.data(), nullptr, position, stopped.view());
  model.table.set_rule(1, model.thresholds, model.pinned);
  expect(is_at(reached, 1, true, model.layers[1].weights.top_k) && stopped.has_routed(plain[1]), isa.name,
         "a token up to a layer that skips all experts" + at);

  std::vector<bool> unknown(count);
  unknown[1] = true;
  reached = model.stack(isa, unknown).run(&model.table, 0, x.data(), nullptr, position, stopped.view());
  expect(is_at(reached, 1, false, 0) && stopped.has_residual(plain[1].in) && told(reached, plain, 0), isa.name,
         "a token up to a layer that is not known" + at);
  reached = model.stack(isa, unknown)
                .run(&model.table, 1, plain[0].residual.data(), plain[0].sum.data(), position, stopped.view());
  expect(is_at(reached, 1, false, 0) && stopped.has_residual(plain[1].in), isa.name,
         "a token in a layer that is not known" + at);
}

/// A layer without a router: attention is done, all else is the caller's.
void check_dense_layer(const Kernels& isa, const Model& model, const std::vector<float>& x, const Position& position,
                       const std::vector<PlainLayer>& plain) {
  std::vector<std::optional<LayerWeights>> layers;
  for (const Layer& layer : model.layers) layers.push_back(layer.weights);
  layers[1]->experts = layers[1]->top_k = 0, layers[1]->router = {nullptr, nullptr};
  DecodeStack stack(isa, layers, Activation::silu);
  stack.set_caches(model.caches());
  const Buffers token(model);
  const Reached reached = stack.run(&model.table, 0, x.data(), nullptr, position, token.view());
  expect(is_at(reached, 1, true, 0) && token.has_residual(plain[1].residual) && told(reached, plain, 0), isa.name,
         "a token up to a dense layer");
  expect_refused([&] { stack.route(1, nullptr, x.data(), token.h.get(), token.experts.get(), token.weights.get()); },
                 isa.name, "the router of a dense layer");
}

void check_routers(const Kernels& isa, Model& model) {
  const DecodeStack stack = model.stack(isa);
  const std::vector<float> x = random_floats(model.hidden), weight = random_floats(kExperts * model.hidden),
                           bias = random_floats(kExperts);
  const Router other{weight.data(), bias.data()};
  for (int64_t l = 0; l < int64_t(model.layers.size()); ++l)
    for (const Router* router : {static_cast<const Router*>(nullptr), &other}) {
      const LayerWeights& w = model.layers[l].weights;
      PlainLayer plain;
      plain.residual = x;
      plain_route(isa, w, router ? *router : w.router, plain);
      const Buffers token(model, w.top_k);
      std::copy(x.begin(), x.end(), token.residual.get());
      stack.route(l, router, x.data(), token.h.get(), token.experts.get(), token.weights.get());
      expect(token.has_routed(plain), isa.name, "a router that is asked");
    }
}

/// What is not finite stops a token where its experts would be chosen.
void check_not_finite(const Kernels& isa, const Model& model) {
  std::vector<float> x = random_floats(model.hidden);
  x[3] = NAN;
  const Buffers token(model);
  const Angles angles(0, model.layers[0].weights.head_dim);
  const Reached reached = model.stack(isa).run(&model.table, 0, x.data(), nullptr, angles.position, token.view());
  bool spoilt = is_at(reached, 0, true, model.layers[0].weights.top_k) && reached.used.empty();
  for (int64_t i = 0; i < model.hidden; ++i) spoilt = spoilt && std::isnan(token.residual[i]) && std::isnan(token.h[i]);
  for (int64_t j = 0; j < reached.chosen; ++j)
    spoilt = spoilt && std::isnan(token.weights[j]) && token.experts[j] >= 0 && token.experts[j] < kExperts;
  expect(spoilt, isa.name, "a token that is not finite");
}

/// Some tokens through all layers, with so many threads, each held against the operations one by one, with one.
void check_tokens(const Kernels& isa, Model& model, int64_t tokens, int thread_count, std::set<int>& tiers) {
  std::vector<OtherCache> caches;
  for (const Layer& layer : model.layers) caches.emplace_back(layer);
  for (int64_t index = 0; index < tokens; ++index) {
    const std::vector<float> x = random_floats(model.hidden);
    const Angles angles(index, model.layers[0].weights.head_dim);
    set_threads(1);
    const std::vector<PlainLayer> plain = plain_run(isa, model, x, angles.position, caches);
    set_threads(thread_count);
    for (const PlainLayer& layer : plain) tiers.insert(layer.tiers.begin(), layer.tiers.end());
    check_token_in_stack(isa, model, x, angles.position, plain);
    check_dense_layer(isa, model, x, angles.position, plain);
  }
  set_threads(1);
  for (size_t l = 0; l < caches.size(); ++l)
    expect(caches[l].equals(model.layers[l]), isa.name, "keys and values of layer " + std::to_string(l));
}

void check_refusals(const Kernels& isa, Model& model) {
  const std::vector<float> x = random_floats(model.hidden);
  const int64_t count = int64_t(model.layers.size());
  const Buffers token(model);
  DecodeStack stack = model.stack(isa);
  const auto run = [&](const ResidentTable* table, int64_t first, int64_t index) {
    const Angles angles(index, model.layers[0].weights.head_dim);
    stack.run(table, first, x.data(), nullptr, angles.position, token.view());
  };
  const ResidentTable fewer(count - 1, kExperts, kLadder), others(count, kExperts + 1, kLadder);
  ResidentTable narrow(count, kExperts, kLadder);
  const ExpertMatrices small(model.hidden - 1, model.width, {2}, 4);
  narrow.put(0, 0, 2, &small.view);
  for (int64_t first : {int64_t(-1), count})
    expect_refused([&] { run(&model.table, first, 0); }, isa.name, "a layer that there is not");
  for (int64_t index : {int64_t(-1), kCapacity})
    expect_refused([&] { run(&model.table, 0, index); }, isa.name, "a position that there is not");
  for (const ResidentTable* table : {&fewer, &others, const_cast<const ResidentTable*>(&narrow)})
    expect_refused([&] { run(table, 0, 0); }, isa.name, "experts of another model");
  for (int64_t layer : {int64_t(-1), count})
    expect_refused(
        [&] { stack.route(layer, nullptr, x.data(), token.h.get(), token.experts.get(), token.weights.get()); },
        isa.name, "a router that there is not");
  std::vector<LayerCache> caches = model.caches();
  caches.pop_back();
  expect_refused([&] { stack.set_caches(caches); }, isa.name, "a cache too few");

  const auto refuses = [&](const std::vector<std::optional<LayerWeights>>& layers, const std::string& what) {
    expect_refused([&] { DecodeStack(isa, layers, Activation::silu); }, isa.name, what);
  };
  refuses({{}, {}}, "a model of which no layer is known");
  const LayerWeights good = model.layers[0].weights,
                     other = Layer(model.hidden + 1, kExperts, model.shapes[0], 1).weights;
  refuses({good, other}, "layers of two widths");
  std::vector<LayerWeights> wrong(6, good);
  wrong[0].kv_heads = 3, wrong[1].kv_heads = 0, wrong[2].head_dim = 15, wrong[3].top_k = kExperts + 1;
  wrong[4].heads = 2 * good.heads, wrong[5].hidden = model.hidden + 64;
  for (size_t i = 0; i < wrong.size(); ++i) refuses({good, wrong[i]}, "a layer of wrong numbers, " + std::to_string(i));
}

/// Resident experts as they come and go, and what a token may ask.
void check_table() {
  const char* const whose = "resident experts";
  const ExpertMatrices one(70, 24, {2}, 4), two(70, 24, {2, 1, 1}, 4), other(70, 25, {2}, 4);
  ResidentTable table(2, kExperts, kLadder);
  expect(table.fits(2, kExperts, 1) && !table.fits(1, kExperts, 70), whose, "an empty table");
  table.put(1, 2, 2, &one.view), table.put(1, 2, 4, &two.view), table.put(0, 2, 2, &one.view);
  expect(table.find(1, 2, 2) == &one.view && table.find(1, 2, 4) == &two.view && !table.find(1, 1, 2), whose, "find");
  table.put(1, 2, 2, &two.view);
  expect(table.find(1, 2, 2) == &two.view, whose, "an expert that has moved");
  table.remove(1, 2, 2), table.remove(1, 3, 2);
  expect(!table.find(1, 2, 2) && table.find(1, 2, 4) && table.find(0, 2, 2), whose, "an expert that has left");
  expect(table.fits(2, kExperts, 70) && !table.fits(2, kExperts, 71) && !table.fits(2, kExperts + 1, 70), whose,
         "fits");
  expect_refused([&] { table.put(0, 0, 2, &other.view); }, whose, "an expert of another shape");
  const struct {
    int64_t layer, expert;
    int tier;
  } none[] = {{-1, 0, 2}, {2, 0, 2}, {0, -1, 2}, {0, kExperts, 2}, {0, 0, 3}};
  for (const auto& where : none) {
    expect_refused([&] { table.put(where.layer, where.expert, where.tier, &one.view); }, whose, "a place to put");
    expect_refused([&] { table.remove(where.layer, where.expert, where.tier); }, whose, "a place to remove from");
    expect_refused([&] { table.find(where.layer, where.expert, where.tier); }, whose, "a place to find");
  }

  const int64_t experts[] = {4, 0, 2};
  const float weights[] = {0.5f, 0.25f, 0.25f};
  const auto tiers = [&](const std::vector<double>& thresholds, const std::vector<int64_t>& pinned) {
    table.set_rule(0, thresholds, pinned);
    std::vector<int> chosen(3);
    table.choose_tiers(0, experts, weights, 3, chosen.data());
    return chosen;
  };
  using Tiers = std::vector<int>;
  expect(tiers({0.4, 0.6}, {}) == Tiers{4, 2, 0}, whose, "tiers by share");
  expect(tiers({0.5, 0.75}, {}) == Tiers{4, 2, 0}, whose, "a share that a threshold does not exceed");
  expect(tiers({0.4, 0.6}, {2, 3}) == Tiers{4, 2, 4}, whose, "a pinned expert");
  expect(tiers({2.0, 2.0}, {}) == Tiers{4, 4, 4}, whose, "thresholds above any share");
  expect(tiers({0.0, 2.0}, {}) == Tiers{2, 2, 2}, whose, "a threshold of none");
  expect(tiers({0.0, 0.0}, {}) == Tiers{0, 0, 0}, whose, "thresholds of none");
  int chosen[3];
  expect_refused([&] { table.choose_tiers(1, experts, weights, 3, chosen); }, whose, "a layer without a rule");
  expect_refused([&] { table.set_rule(0, {0.5}, {}); }, whose, "a threshold too few");
  expect_refused([&] { table.set_rule(2, {0.5, 0.5}, {}); }, whose, "a rule of no layer");
  for (int64_t expert : {int64_t(-1), kExperts})
    expect_refused([&] { table.set_rule(0, {0.5, 0.5}, {expert}); }, whose, "a pinned expert that there is not");
}

void check_stack(const Kernels& isa) {
  // heads, KV heads, head_dim, window, top_k, clip, norm of queries and keys, normalize, biases, bits of the cache
  Model small(100, 72,
              {{4, 2, 16, 0, 3, 0.0f, QkNorm::head, false, true, 16},
               {6, 2, 16, 3, 2, 0.0f, QkNorm::none, true, false, 8},
               {2, 1, 16, 0, 3, 0.5f, QkNorm::full, true, true, 32},
               {4, 4, 16, 2, 3, 1.0f, QkNorm::head, false, false, 16}});
  Model odd(
      70, 24,
      {{3, 1, 20, 2, 3, 0.5f, QkNorm::full, false, false, 8}, {5, 5, 20, 0, 3, 0.0f, QkNorm::none, true, true, 16}});
  // Wide enough for threads to share the work.
  Model wide(
      512, 320,
      {{8, 4, 64, 0, 3, 0.0f, QkNorm::head, true, false, 16}, {8, 2, 64, 0, 3, 0.0f, QkNorm::none, false, true, 8}});
  std::set<int> tiers;
  check_tokens(isa, small, kCapacity, 1, tiers);
  check_tokens(isa, odd, kCapacity, 2, tiers);
  check_tokens(isa, wide, 1, 3, tiers);
  expect(tiers == std::set<int>{0, 2, 4}, isa.name, "experts at both tiers, and skipped ones");
  check_routers(isa, small);
  check_not_finite(isa, small);
  check_refusals(isa, small);
}

}  // namespace
}  // namespace dymoe

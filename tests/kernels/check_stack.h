// Checks a decoded token through whole layers: DecodeStack and ResidentTable against the operations one by one.
#pragma once

#include <functional>
#include <numeric>
#include <set>

#include "check.h"
#include "decode/stack.h"
#include "plain_layer.h"
#include "threads/pool.h"

namespace dymoe {
namespace {

constexpr int64_t kExperts = 6;
const std::vector<int> kLadder = {2, 4};
constexpr int64_t kCapacity = 7;

/// A layer without tensors and without options: attention and routed experts behind norms.
LayerWeights plain_options(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t top_k) {
  AttentionLayer attention{};
  attention.heads = heads, attention.kv_heads = kv_heads, attention.head_dim = attention.turning = head_dim;
  MoeLayer moe{};
  moe.rule = {kExperts, top_k, RouterScore::softmax, 1, 1, true, false, 1.0f, 0.0f, 0.0f, 0.0f, nullptr, nullptr, 0.0f};
  LayerWeights layer{};
  layer.eps = 1e-5f, layer.residual_scale = 1.0f, layer.pre_norms = true;
  layer.mixer = attention, layer.feed_forward = moe;
  return layer;
}

/// A layer with these options, which `change` sets.
LayerWeights attention_layer(LayerWeights layer, const std::function<void(AttentionLayer&, MoeLayer&)>& change) {
  change(std::get<AttentionLayer>(layer.mixer), std::get<MoeLayer>(layer.feed_forward));
  return layer;
}

LayerWeights delta_layer(LayerWeights layer, const DeltaShape& shape) {
  DeltaLayer delta{};
  delta.shape = shape;
  layer.mixer = delta;
  return layer;
}

LayerWeights dense_layer(LayerWeights layer, int64_t width) {
  layer.feed_forward = MlpLayer{width, {}};
  return layer;
}

/// A parallel layer whose norms have biases, and whose router is sparsemixer.
LayerWeights parallel_layer(LayerWeights layer, const std::optional<SharedLayer>& shared) {
  layer.parallel = true, layer.norm_kind = NormKind::layer_bias;
  auto& moe = std::get<MoeLayer>(layer.feed_forward);
  moe.rule.score = RouterScore::sparsemixer, moe.rule.threshold = 0.9f, moe.shared = shared;
  return layer;
}

SharedLayer shared_expert(int64_t width, bool gated, bool own_norms, float scale) {
  SharedLayer shared{};
  shared.mlp.width = width, shared.gated = gated, shared.own_norms = own_norms, shared.scale = scale;
  return shared;
}

/// A layer whose options want random tensors, and its state.
struct Layer {
  std::vector<Matrix> matrices;
  std::vector<std::unique_ptr<float[]>> floats;
  LayerWeights weights;
  int kv_bits;
  State state;

  Layer(int64_t hidden, LayerWeights options, int bits)
      : weights(std::move(options)), kv_bits(bits), state(weights, kCapacity, kv_bits) {
    weights.hidden = hidden;
    state.fill(0xff);  // NaN, which a delta rule forgets at the first token
    if (std::holds_alternative<AttentionLayer>(weights.mixer)) state.fill(0);
    LayerWeights& w = weights;
    w.attn_norm = norm(w.pre_norms), w.mlp_norm = norm(w.pre_norms && !w.parallel);
    w.attn_post_norm = norm(w.post_norms), w.mlp_post_norm = norm(w.post_norms);
    w.scalar = random(w.has_scalar, 1, 1);
    std::visit([&](auto& mixer) { fill(mixer); }, w.mixer);
    std::visit([&](auto& part) { fill(part); }, w.feed_forward);
  }

 private:
  FloatMatrix random(bool wanted, int64_t rows, int64_t cols) {
    if (!wanted) return {};
    const Floats1D values = random_floats(rows * cols);
    floats.push_back(buffer<float>(rows * cols));
    std::copy(values.begin(), values.end(), floats.back().get());
    return {floats.back().get(), rows, cols};
  }

  Norm norm(bool wanted) {
    const int64_t hidden = weights.hidden;
    return {random(wanted, 1, hidden), random(wanted && weights.norm_kind == NormKind::layer_bias, 1, hidden)};
  }

  MatrixView matrix(int64_t rows, int64_t cols) {
    constexpr uint16_t kMultiplier = 0x3880;  // 2^-14: outputs about as large as inputs
    matrices.emplace_back(rows, cols, std::vector<int>{8}, 8, kMultiplier);
    return matrices.back().view;
  }

  Linear linear(int64_t rows, int64_t cols, bool has_bias) {
    return {matrix(rows, cols), random(has_bias, 1, rows).data};
  }

  void fill(AttentionLayer& w) {
    const int64_t hidden = weights.hidden, q = w.heads * w.head_dim, kv = w.kv_heads * w.head_dim;
    const bool is_full = w.qk_norm == QkNorm::full, has_norm = w.qk_norm != QkNorm::none;
    w.q = linear(q, hidden, w.bias), w.k = linear(kv, hidden, w.bias), w.v = linear(kv, hidden, w.bias);
    w.o = linear(hidden, q, w.output_bias);
    w.q_norm = random(has_norm, 1, is_full ? q : w.head_dim), w.k_norm = random(has_norm, 1, is_full ? kv : w.head_dim);
    w.v_norm = random(w.value_norm, 1, w.head_dim), w.sinks = random(w.has_sinks, 1, w.heads);
    if (w.output_gate == OutputGate::element) w.gate = linear(q, hidden, false);
    if (w.output_gate == OutputGate::head) w.gate = linear(w.heads, hidden, false);
  }

  void fill(DeltaLayer& w) {
    const int64_t hidden = weights.hidden, values = values_of(w.shape), heads = w.shape.value_heads;
    w.qkv = linear(channels_of(w.shape), hidden, false), w.z = linear(values, hidden, false);
    w.o = linear(hidden, values, false);
    w.ba = random(true, 2 * heads, hidden), w.conv = random(true, channels_of(w.shape), w.shape.taps);
    w.a_log = random(true, 1, heads), w.dt_bias = random(true, 1, heads);
    w.norm = random(true, 1, w.shape.value_dim);
  }

  void fill(MlpLayer& w) {
    w.matrices.gate = matrix(w.width, weights.hidden), w.matrices.up = matrix(w.width, weights.hidden);
    w.matrices.down = matrix(weights.hidden, w.width);
  }

  void fill(MoeLayer& w) {
    const int64_t hidden = weights.hidden, experts = w.rule.experts;
    w.router = random(true, experts, hidden), w.router_bias = random(w.bias, 1, experts);
    w.select = random(w.selection_bias, 1, experts), w.scale = random(w.expert_scale, 1, experts);
    for (int64_t e = 0; e < w.scale.cols; ++e) floats.back()[e] = 0.5f + float(e);  // weights are positive
    if (!w.shared) return;
    SharedLayer& shared = *w.shared;
    fill(shared.mlp);
    shared.gate = random(shared.gated, 1, hidden), shared.norm = norm(shared.own_norms);
    shared.post_norm = norm(shared.own_norms), shared.experts_post_norm = norm(shared.own_norms);
  }
};

/// What a layer is and the bits of its KV cache.
struct LayerShape {
  LayerWeights options;
  int kv_bits;
};

/// A model whose experts are all resident. Layer l has as its expert e number (e + l) % kExperts of `experts`.
struct Model {
  int64_t hidden, width;
  std::vector<Layer> layers;
  std::vector<ExpertMatrices> low, high;  // at tier 2 and at tier 4
  std::vector<double> thresholds;
  std::vector<int64_t> pinned;  // in each layer
  ResidentTable table;

  Model(int64_t hidden_size, int64_t expert_width, const std::vector<LayerShape>& shapes)
      : hidden(hidden_size),
        width(expert_width),
        thresholds{0.3, 0.75},
        pinned{3},
        table(int64_t(shapes.size()), kExperts, kLadder) {
    for (const LayerShape& shape : shapes) layers.emplace_back(hidden, shape.options, shape.kv_bits);
    for (int64_t e = 0; e < kExperts; ++e) {
      low.emplace_back(hidden, width, std::vector<int>{2}, 4);
      high.emplace_back(hidden, width, std::vector<int>{2, 1, 1}, 4);
    }
    for (int64_t l = 0; l < count(); ++l) {
      table.set_rule(l, thresholds, pinned);
      for (int64_t e = 0; e < kExperts; ++e)
        for (int tier : kLadder) table.put(l, e, tier, &expert(l, e, tier));
    }
  }

  int64_t count() const { return int64_t(layers.size()); }
  const MoeLayer* moe(int64_t layer) const { return layers[layer].weights.moe(); }

  const Expert& expert(int64_t layer, int64_t e, int tier) const {
    return (tier == 2 ? low : high)[(e + layer) % kExperts].view;
  }

  /// The stack of all layers but one.
  DecodeStack stack(const Kernels& isa, int64_t unknown = -1) const {
    std::vector<std::optional<LayerWeights>> known;
    for (const Layer& layer : layers) known.emplace_back(layer.weights);
    std::vector<LayerState> of_layers = states();
    if (unknown >= 0) known[unknown].reset(), of_layers[unknown] = std::monostate();
    DecodeStack stack(isa, known, kSilu);
    stack.set_states({of_layers});
    return stack;
  }

  std::vector<LayerState> states() const {
    std::vector<LayerState> views;
    for (const Layer& layer : layers) views.push_back(layer.state.view);
    return views;
  }

  /// States of the same shapes, for the operations one by one, or to go back to.
  std::vector<State> other_states() const {
    std::vector<State> others;
    for (const Layer& layer : layers) others.emplace_back(layer.weights, kCapacity, layer.kv_bits);
    return others;
  }
};

/// The angles of a position for two rotary embeddings, in buffers of their own; the layers' columns that turn differ.
struct Angles {
  std::vector<std::unique_ptr<float[]>> tables;
  Position position;

  Angles(int64_t index, const Model& model) : position{index, {}} {
    for (int64_t rotation = 0; rotation < 2; ++rotation) {
      int64_t turning = 2;
      for (const Layer& layer : model.layers)
        if (const auto* w = std::get_if<AttentionLayer>(&layer.weights.mixer); w && w->rotation == rotation)
          turning = w->turning;
      auto cosines = buffer<float>(turning), sines = buffer<float>(turning);
      for (int64_t i = 0; i < turning; ++i) {
        const float angle = float(index) / float(1 + rotation + i % (turning / 2));
        cosines[i] = std::cos(angle), sines[i] = std::sin(angle);
      }
      position.rotations.push_back({cosines.get(), sines.get()});
      tables.push_back(std::move(cosines)), tables.push_back(std::move(sines));
    }
  }
};

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
Floats1D plain_experts(const Kernels& isa, const Model& model, int64_t number, const PlainLayer& layer) {
  std::vector<ExpertRows> parts;
  std::vector<int64_t> tokens, rows;
  for (size_t j = 0; j < layer.experts.size(); ++j) {
    rows.push_back(layer.tiers[j] ? int64_t(parts.size()) : -1);
    if (!layer.tiers[j]) continue;
    parts.push_back({model.expert(number, layer.experts[j], layer.tiers[j]), rows.back(), 1});
    tokens.push_back(0);
  }
  Floats1D y(parts.size() * model.hidden), sum(model.hidden);
  moe(isa, parts, layer.h.data(), tokens.data(), kSilu, y.data());
  combine(y.data(), rows.data(), layer.weights.data(), 1, int64_t(rows.size()), model.hidden, sum.data());
  return sum;
}

/// A token through all layers; the last entry has what leaves the last layer.
std::vector<PlainLayer> plain_run(const Kernels& isa, const Model& model, Floats1D x, const Position& position,
                                  const std::vector<State>& states) {
  std::vector<PlainLayer> layers(model.layers.size() + 1);
  for (int64_t l = 0; l < model.count(); ++l) {
    PlainLayer& layer = layers[l];
    const LayerWeights& w = model.layers[l].weights;
    layer.in = x;
    layer.residual = plain_mix(isa, w, x, position, states[l].view);
    if (model.moe(l)) {
      plain_route(isa, w, layer);
      layer.tiers = plain_tiers(model, layer);
      layer.sum = plain_experts(isa, model, l, layer);
    }
    x = plain_finish(isa, w, layer);
  }
  layers.back().in = x;
  return layers;
}

/// Buffers that a stack writes to.
struct Buffers {
  std::unique_ptr<float[]> residual, h, weights;
  std::unique_ptr<int64_t[]> experts;

  explicit Buffers(const Model& model, int64_t most_experts = 3)
      : residual(buffer<float>(model.hidden)),
        h(buffer<float>(model.hidden)),
        weights(buffer<float>(most_experts)),
        experts(buffer<int64_t>(most_experts)) {}

  TokenBuffers view() const { return {residual.get(), h.get(), experts.get(), weights.get()}; }

  bool has_residual(const Floats1D& expected) const {
    return std::equal(expected.begin(), expected.end(), residual.get());
  }

  bool has_chosen(const PlainLayer& layer) const {
    return std::equal(layer.experts.begin(), layer.experts.end(), experts.get()) &&
           std::equal(layer.weights.begin(), layer.weights.end(), weights.get());
  }

  /// Whether they have what the experts of a layer read, and which ones its router chose.
  bool has_routed(const PlainLayer& layer) const {
    return has_residual(layer.residual) && std::equal(layer.h.begin(), layer.h.end(), h.get()) && has_chosen(layer);
  }
};

bool is_at(const Reached& reached, int64_t layer, bool attended, int64_t chosen) {
  return reached.layer == layer && reached.attended == attended && reached.chosen == chosen;
}

/// Whether the layers with experts from `first` up to the one reached are told as used, and no others.
bool told(const Reached& reached, const std::vector<PlainLayer>& plain, int64_t first) {
  size_t i = 0;
  for (int64_t l = first; l < reached.layer; ++l) {
    if (plain[l].experts.empty()) continue;
    if (i == reached.used.size()) return false;
    const LayerUse& use = reached.used[i++];
    if (use.layer != l || use.experts != plain[l].experts || use.tiers != plain[l].tiers) return false;
  }
  return i == reached.used.size();
}

/// One token in a model, which may run more than once: each run continues from the same states.
struct TokenCheck {
  const Kernels& isa;
  Model& model;
  const Position& position;
  const std::vector<PlainLayer>& plain;
  std::vector<State> before;

  TokenCheck(const Kernels& kernels, Model& of, const Position& at, const std::vector<PlainLayer>& expected)
      : isa(kernels), model(of), position(at), plain(expected), before(of.other_states()) {
    for (int64_t l = 0; l < model.count(); ++l) before[l].take(model.layers[l].state);
  }

  Reached run(const DecodeStack& stack, const ResidentTable* table, int64_t first, const float* x, const float* more,
              const Buffers& buffers) const {
    for (int64_t l = 0; l < model.count(); ++l) model.layers[l].state.take(before[l]);
    return stack.run(table, first, x, more, {position}, buffers.view());
  }

  void check(bool ok, const std::string& what) const {
    expect(ok, isa.name, what + " at position " + std::to_string(position.index));
  }

  /// A token that stops: at experts that are not resident or not used, and at a layer that is not known.
  void check_stops() const {
    const int64_t count = model.count(), last = count - 1, top_k = model.moe(last)->rule.top_k;
    const DecodeStack stack = model.stack(isa);
    const float* x = plain[0].in.data();
    const Buffers alone(model), stopped(model);
    Reached reached = run(stack, nullptr, 1, plain[1].in.data(), nullptr, alone);
    check(is_at(reached, 1, true, model.moe(1)->rule.top_k) && alone.has_routed(plain[1]) && reached.used.empty(),
          "a token through one layer");

    // The last expert that the last layer uses is not resident.
    size_t rank = plain[last].experts.size() - 1;
    while (!plain[last].tiers[rank]) --rank;
    const int64_t missing = plain[last].experts[rank];
    const int tier = plain[last].tiers[rank];
    model.table.remove(last, missing, tier);
    reached = run(stack, &model.table, 0, x, nullptr, stopped);
    model.table.put(last, missing, tier, &model.expert(last, missing, tier));
    check(is_at(reached, last, true, top_k) && stopped.has_routed(plain[last]) && told(reached, plain, 0),
          "a token up to an expert that is not resident");

    // A layer that uses no expert at all is the caller's too.
    model.table.set_rule(1, {0.0, 0.0}, {});
    reached = run(stack, &model.table, 0, x, nullptr, stopped);
    model.table.set_rule(1, model.thresholds, model.pinned);
    check(is_at(reached, 1, true, model.moe(1)->rule.top_k) && stopped.has_routed(plain[1]),
          "a token up to a layer that skips all experts");

    for (int64_t unknown : {int64_t(0), int64_t(1), last}) {
      const DecodeStack partly = model.stack(isa, unknown);
      reached = run(partly, &model.table, 0, x, nullptr, stopped);
      check(is_at(reached, unknown, false, 0) && stopped.has_residual(plain[unknown].in) && told(reached, plain, 0),
            "a token up to a layer that is not known");
      if (unknown == 0 || !model.moe(unknown - 1)) continue;
      const PlainLayer& layer = plain[unknown - 1];
      reached = run(partly, &model.table, unknown, layer.residual.data(), layer.sum.data(), stopped);
      check(is_at(reached, unknown, false, 0) && stopped.has_residual(plain[unknown].in),
            "a layer that is finished before one that is not known");
    }
  }

  /// A token from each layer on, whose experts the caller has run or not, and through all layers.
  void check_layers() const {
    const int64_t count = model.count();
    const DecodeStack stack = model.stack(isa);
    for (int64_t l = count; l >= 0; --l) {
      const std::string where = std::to_string(l);
      const Buffers token(model);
      if (l > 0 && model.moe(l - 1)) {
        const PlainLayer& layer = plain[l - 1];
        std::copy(layer.residual.begin(), layer.residual.end(), token.residual.get());
        const Reached reached = run(stack, &model.table, l, token.residual.get(), layer.sum.data(), token);
        check(is_at(reached, count, true, 0) && token.has_residual(plain[count].in) && told(reached, plain, l),
              "a token from the experts before layer " + where + " on");
      }
      if (l == count) continue;
      const Reached reached = run(stack, &model.table, l, plain[l].in.data(), nullptr, token);
      check(is_at(reached, count, true, 0) && token.has_residual(plain[count].in) && told(reached, plain, l),
            "a token from layer " + where + " on");
    }
  }
};

void check_routers(const Kernels& isa, const Model& model) {
  const DecodeStack stack = model.stack(isa);
  const Floats1D x = random_floats(model.hidden), weight = random_floats(kExperts * model.hidden),
                 bias = random_floats(kExperts);
  const Router other{weight.data(), bias.data()};
  for (int64_t l = 0; l < model.count(); ++l) {
    if (!model.moe(l)) continue;
    for (const Router* router : {static_cast<const Router*>(nullptr), &other}) {
      PlainLayer plain;
      plain.in = plain.residual = x;
      plain_choose(isa, model.layers[l].weights, router, plain);
      const Buffers token(model, model.moe(l)->rule.top_k);
      stack.route(l, router, x.data(), token.experts.get(), token.weights.get());
      expect(token.has_chosen(plain), isa.name, "a router that is asked");
    }
  }
}

/// What is not finite stops a token where its experts would be chosen.
void check_not_finite(const Kernels& isa, const Model& model) {
  Floats1D x = random_floats(model.hidden);
  x[3] = NAN;
  const Buffers token(model);
  const Angles angles(0, model);
  const Reached reached = model.stack(isa).run(&model.table, 0, x.data(), nullptr, {angles.position}, token.view());
  bool spoilt = is_at(reached, 0, true, model.moe(0)->rule.top_k) && reached.used.empty();
  for (int64_t i = 0; i < model.hidden; ++i) spoilt = spoilt && std::isnan(token.residual[i]) && std::isnan(token.h[i]);
  for (int64_t j = 0; j < reached.chosen; ++j)
    spoilt = spoilt && std::isnan(token.weights[j]) && token.experts[j] >= 0 && token.experts[j] < kExperts;
  expect(spoilt, isa.name, "a token that is not finite");
}

/// Some tokens through all layers, with so many threads, each held against the operations one by one, with one.
void check_tokens(const Kernels& isa, Model& model, int64_t tokens, int thread_count, std::set<int>& tiers) {
  const std::vector<State> others = model.other_states();
  for (int64_t index = 0; index < tokens; ++index) {
    const Floats1D x = random_floats(model.hidden);
    const Angles angles(index, model);
    set_threads(1);
    const std::vector<PlainLayer> plain = plain_run(isa, model, x, angles.position, others);
    set_threads(thread_count);
    for (const PlainLayer& layer : plain) tiers.insert(layer.tiers.begin(), layer.tiers.end());
    const TokenCheck token(isa, model, angles.position, plain);
    token.check_stops();
    token.check_layers();
  }
  set_threads(1);
  for (int64_t l = 0; l < model.count(); ++l)
    expect(others[l].equals(model.layers[l].state), isa.name, "the state of layer " + std::to_string(l));
}

void check_refusals(const Kernels& isa, const Model& model) {
  const Floats1D x = random_floats(model.hidden);
  const int64_t count = model.count();
  const Buffers token(model);
  DecodeStack stack = model.stack(isa);
  const auto run = [&](const ResidentTable* table, int64_t first, int64_t index, const float* more = nullptr) {
    const Angles angles(index, model);
    stack.run(table, first, x.data(), more, {angles.position}, token.view());
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
  for (int64_t first = 0; first < count + 2; ++first)
    if (first == 0 || first > count || !model.moe(first - 1))
      expect_refused([&] { run(&model.table, first, 0, x.data()); }, isa.name, "experts that there are not");
  for (int64_t layer = -1; layer < count + 1; ++layer)
    if (layer < 0 || layer == count || !model.moe(layer))
      expect_refused([&] { stack.route(layer, nullptr, x.data(), token.experts.get(), token.weights.get()); }, isa.name,
                     "a router that there is not");
  Angles fewer_angles(0, model);
  fewer_angles.position.rotations.pop_back();
  expect_refused([&] { stack.run(&model.table, 0, x.data(), nullptr, {fewer_angles.position}, token.view()); },
                 isa.name, "a rotary embedding too few");
  std::vector<LayerState> states = model.states();
  states.pop_back();
  expect_refused([&] { stack.set_states({states}); }, isa.name, "a state too few");
  for (int64_t l = 0; l < count; ++l) {
    states = model.states();
    states[l] = std::monostate();
    expect_refused([&] { stack.set_states({states}); }, isa.name, "a layer without its state");
    if (auto* arrays = std::get_if<DeltaArrays>(&(states[l] = model.layers[l].state.view)))
      --arrays->memory;
    else
      states[l] = DeltaArrays{{nullptr, nullptr}, 0, 0};
    expect_refused([&] { stack.set_states({states}); }, isa.name, "the state of another layer");
  }
}

/// Layers whose numbers or tensors do not fit: each mistake made alone.
void check_layer_refusals(const Kernels& isa, const Model& model) {
  const auto refuses = [&](const std::vector<std::optional<LayerWeights>>& layers, const std::string& what) {
    expect_refused([&] { DecodeStack(isa, layers, kSilu); }, isa.name, what);
  };
  const LayerWeights good = model.layers[0].weights;
  refuses({{}, {}}, "a model of which no layer is known");
  refuses({good, Layer(model.hidden + 1, model.layers[0].weights, 16).weights}, "layers of two widths");
  using Change = std::function<void(LayerWeights&)>;
  const auto mistakes = [&](const std::vector<LayerWeights>& layers, const std::vector<Change>& changes) {
    for (size_t l = 0; l < layers.size(); ++l)
      for (size_t i = 0; i < changes.size(); ++i) {
        LayerWeights layer = layers[l];
        changes[i](layer);
        refuses({good, layer}, "a layer of wrong numbers, " + std::to_string(l) + ", " + std::to_string(i));
      }
  };
  std::vector<LayerWeights> all, normed, attention, delta, dense, routed, shared;
  for (const Layer& layer : model.layers) {
    const LayerWeights& w = layer.weights;
    all.push_back(w);
    if (w.pre_norms) normed.push_back(w);
    (std::holds_alternative<AttentionLayer>(w.mixer) ? attention : delta).push_back(w);
    (w.moe() ? routed : dense).push_back(w);
    if (w.moe() && w.moe()->shared) shared.push_back(w);
  }
  mistakes(
      all,
      {[](LayerWeights& w) { w.hidden += 64; }, [](LayerWeights& w) { w.pre_norms = !w.pre_norms; },
       [](LayerWeights& w) { w.post_norms = !w.post_norms; }, [](LayerWeights& w) { w.has_scalar = !w.has_scalar; },
       [](LayerWeights& w) { w.scalar.cols += 1; }, [](LayerWeights& w) { w.mlp_norm.weight.cols += 1; },
       [](LayerWeights& w) { w.attn_post_norm.weight.cols += 1; },
       [](LayerWeights& w) { w.attn_post_norm.bias.cols += 1; }, [](LayerWeights& w) { w.parallel = !w.parallel; }});
  mistakes(normed, {[](LayerWeights& w) {
             const bool biased = w.norm_kind == NormKind::layer_bias;
             w.norm_kind = biased ? NormKind::layer : NormKind::layer_bias;
           }});
  const auto of_attention = [](const std::function<void(AttentionLayer&)>& change) -> Change {
    return [=](LayerWeights& w) { change(std::get<AttentionLayer>(w.mixer)); };
  };
  mistakes(
      attention,
      {of_attention([](AttentionLayer& w) { w.kv_heads += 1; }),
       of_attention([](AttentionLayer& w) { w.kv_heads = 0; }),
       of_attention([](AttentionLayer& w) { w.head_dim -= 1; }), of_attention([](AttentionLayer& w) { w.heads *= 2; }),
       of_attention([](AttentionLayer& w) { w.window = -1; }), of_attention([](AttentionLayer& w) { w.chunk = -1; }),
       of_attention([](AttentionLayer& w) { w.rotation = 0, w.turning = w.head_dim + 2; }),
       of_attention([](AttentionLayer& w) { w.rotation = 0, w.turning = 0; }),
       of_attention([](AttentionLayer& w) { w.bias = !w.bias; }),
       of_attention([](AttentionLayer& w) { w.output_bias = !w.output_bias; }),
       of_attention([](AttentionLayer& w) { w.value_norm = !w.value_norm; }),
       of_attention([](AttentionLayer& w) { w.has_sinks = !w.has_sinks; }),
       of_attention([](AttentionLayer& w) { w.sinks.cols += 1; }),
       of_attention([](AttentionLayer& w) { w.k_norm.cols += 1; }),
       of_attention([](AttentionLayer& w) { std::swap(w.o, w.k); }), of_attention([](AttentionLayer& w) {
         w.output_gate = w.output_gate == OutputGate::head ? OutputGate::element : OutputGate::head;
       })});
  const auto of_delta = [](const std::function<void(DeltaLayer&)>& change) -> Change {
    return [=](LayerWeights& w) { change(std::get<DeltaLayer>(w.mixer)); };
  };
  mistakes(delta, {of_delta([](DeltaLayer& w) { w.shape.key_heads += 1; }),
                   of_delta([](DeltaLayer& w) { w.shape.value_heads *= 2; }),
                   of_delta([](DeltaLayer& w) { w.shape.taps += 1; }), of_delta([](DeltaLayer& w) { w.ba.rows /= 2; }),
                   of_delta([](DeltaLayer& w) { w.dt_bias.cols += 1; }), of_delta([](DeltaLayer& w) { w.norm = {}; }),
                   of_delta([](DeltaLayer& w) { std::swap(w.z, w.qkv); })});
  mistakes(dense, {[](LayerWeights& w) { std::get<MlpLayer>(w.feed_forward).width += 1; },
                   [](LayerWeights& w) {
                     Expert& m = std::get<MlpLayer>(w.feed_forward).matrices;
                     std::swap(m.up, m.down);
                   }});
  const auto of_router = [](const std::function<void(MoeLayer&)>& change) -> Change {
    return [=](LayerWeights& w) { change(std::get<MoeLayer>(w.feed_forward)); };
  };
  mistakes(routed,
           {of_router([](MoeLayer& w) { w.rule.top_k = kExperts + 1; }),
            of_router([](MoeLayer& w) { w.rule.top_k = 0; }), of_router([](MoeLayer& w) { w.rule.groups = 4; }),
            of_router([](MoeLayer& w) { w.rule.experts += 1; }), of_router([](MoeLayer& w) { w.bias = !w.bias; }),
            of_router([](MoeLayer& w) { w.selection_bias = !w.selection_bias; }),
            of_router([](MoeLayer& w) { w.expert_scale = !w.expert_scale; }),
            of_router([](MoeLayer& w) { w.scales_input = true, w.rule.top_k = 2; })});
  mistakes(shared, {of_router([](MoeLayer& w) { w.shared->gated = !w.shared->gated; }),
                    of_router([](MoeLayer& w) { w.shared->own_norms = !w.shared->own_norms; }),
                    of_router([](MoeLayer& w) { w.shared->mlp.width += 1; })});
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

/// Layers that together have every option, with experts in the second and in the last one.
std::vector<LayerShape> layers_of_all_options() {
  const DeltaShape delta{2, 4, 12, 20, 3};
  std::vector<LayerShape> shapes;
  shapes.push_back({attention_layer(plain_options(4, 2, 16, 3),
                                    [](AttentionLayer& w, MoeLayer& moe) {
                                      w.qk_norm = QkNorm::head, w.bias = w.output_bias = true;
                                      moe.rule.score = RouterScore::sigmoid, moe.rule.normalize = true;
                                      moe.rule.eps = 1e-3f, moe.rule.scale = 2.5f, moe.rule.softcap = 3.0f;
                                      moe.rule.groups = 3, moe.rule.top_groups = 2;
                                      moe.bias = moe.selection_bias = true;
                                      moe.shared = shared_expert(40, true, false, 0.5f);
                                    }),
                    16});
  shapes.push_back({attention_layer(plain_options(6, 2, 16, 2),
                                    [](AttentionLayer& w, MoeLayer& moe) {
                                      w.window = 3, w.turning = 8, w.rotation = 1, w.has_sinks = true;
                                      w.output_gate = OutputGate::element;
                                      moe.rule.score = RouterScore::softmax_of_chosen;
                                      moe.expert_scale = moe.plain_norm = true;
                                      moe.shared = shared_expert(70, false, true, 1.0f);
                                    }),
                    8});
  shapes.back().options.post_norms = shapes.back().options.has_scalar = true;
  shapes.push_back({delta_layer(plain_options(4, 2, 16, 3), delta), 16});
  shapes.push_back({parallel_layer(plain_options(4, 2, 16, 2), shared_expert(40, true, false, 0.5f)), 16});
  shapes.back().options.residual_scale = 0.5f;
  shapes.push_back({parallel_layer(delta_layer(plain_options(4, 2, 16, 2), delta), {}), 16});
  shapes.push_back({dense_layer(parallel_layer(plain_options(2, 1, 16, 3), {}), 72), 16});
  shapes.push_back({dense_layer(attention_layer(plain_options(2, 1, 16, 3),
                                                [](AttentionLayer& w, MoeLayer&) {
                                                  w.qk_norm = QkNorm::head, w.norm_after_rope = w.value_norm = true;
                                                  w.chunk = 3, w.scale = 0.2, w.output_gate = OutputGate::head;
                                                  w.softplus = true, w.clip = 1.5f;
                                                }),
                                72),
                    32});
  shapes.back().options.residual_scale = 0.25f;
  shapes.push_back({dense_layer(delta_layer(plain_options(4, 2, 16, 3), delta), 72), 16});
  shapes.back().options.pre_norms = false, shapes.back().options.post_norms = true;
  shapes.push_back({attention_layer(plain_options(4, 4, 24, 1),
                                    [](AttentionLayer& w, MoeLayer& moe) {
                                      w.rotation = -1, w.floor = 2.0f, w.strength = 0.5f;
                                      w.qk_norm = QkNorm::full, w.window = 4, w.chunk = 5;
                                      moe.rule.score = RouterScore::sigmoid, moe.scales_input = true;
                                      moe.shared = shared_expert(24, false, false, 1.0f);
                                    }),
                    16});
  shapes.back().options.pre_norms = false;
  return shapes;
}

void check_stack(const Kernels& isa) {
  const auto shape = [](int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window, int64_t top_k, float clip,
                        QkNorm qk_norm, bool normalize, bool biased, int kv_bits) {
    return LayerShape{attention_layer(plain_options(heads, kv_heads, head_dim, top_k),
                                      [=](AttentionLayer& w, MoeLayer& moe) {
                                        w.window = window, w.clip = clip, w.qk_norm = qk_norm;
                                        w.bias = w.output_bias = biased, moe.rule.normalize = normalize;
                                      }),
                      kv_bits};
  };
  Model small(100, 72,
              {shape(4, 2, 16, 0, 3, 0.0f, QkNorm::head, false, true, 16),
               shape(6, 2, 16, 3, 2, 0.0f, QkNorm::none, true, false, 8),
               shape(2, 1, 16, 0, 3, 0.5f, QkNorm::full, true, true, 32),
               shape(4, 4, 16, 2, 3, 1.0f, QkNorm::head, false, false, 16)});
  Model odd(70, 24,
            {shape(3, 1, 20, 2, 3, 0.5f, QkNorm::full, false, false, 8),
             shape(5, 5, 20, 0, 3, 0.0f, QkNorm::none, true, true, 16)});
  // Wide enough for threads to share the work.
  Model wide(512, 320,
             {shape(8, 4, 64, 0, 3, 0.0f, QkNorm::head, true, false, 16),
              shape(8, 2, 64, 0, 3, 0.0f, QkNorm::none, false, true, 8)});
  std::vector<LayerShape> wide_delta;
  wide_delta.push_back({delta_layer(plain_options(4, 2, 16, 2), {2, 8, 64, 64, 4}), 16});
  wide_delta.push_back(shape(4, 2, 64, 0, 2, 0.0f, QkNorm::head, true, false, 16));
  std::get<MoeLayer>(wide_delta.back().options.feed_forward).shared = shared_expert(512, true, false, 1.0f);
  Model wide_options(512, 192, wide_delta);
  Model all(100, 72, layers_of_all_options());
  std::set<int> tiers;
  check_tokens(isa, small, kCapacity, 1, tiers);
  check_tokens(isa, odd, kCapacity, 2, tiers);
  check_tokens(isa, wide, 1, 3, tiers);
  check_tokens(isa, wide_options, 2, 3, tiers);
  check_tokens(isa, all, kCapacity, 2, tiers);
  expect(tiers == std::set<int>{0, 2, 4}, isa.name, "experts at both tiers, and skipped ones");
  for (const Model* model : {&small, &all}) {
    check_routers(isa, *model);
    check_not_finite(isa, *model);
  }
  check_refusals(isa, all);
  check_layer_refusals(isa, all);
}

}  // namespace
}  // namespace dymoe

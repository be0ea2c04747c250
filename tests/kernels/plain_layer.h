// One token through the layers of a model by operations one after another: what DecodeStack is held against.
#pragma once

#include <cmath>
#include <optional>
#include <variant>

#include "check.h"
#include "decode/layer.h"
#include "ops/moe.h"
#include "ops/ops.h"
#include "templates/activate.h"

namespace dymoe {
namespace {

using Floats1D = std::vector<float>;

constexpr Activation kSilu{ActivationKind::silu};

/// The state of a layer, in buffers of exactly its size.
struct State {
  std::unique_ptr<uint8_t[]> bytes;  // keys and values, or the floats of a delta rule
  int64_t nbytes;
  LayerState view;

  State(const LayerWeights& layer, int64_t capacity, int kv_bits) {
    if (const auto* w = std::get_if<AttentionLayer>(&layer.mixer)) {
      const int64_t half = w->kv_heads * capacity * cache_row_bytes(w->head_dim, kv_bits);
      make(2 * half);
      view = LayerCache{bytes.get(), bytes.get() + half, capacity, kv_bits};
    } else {
      const DeltaShape& shape = std::get<DeltaLayer>(layer.mixer).shape;
      const int64_t tail = (shape.taps - 1) * channels_of(shape), memory = values_of(shape) * shape.key_dim;
      make((tail + memory) * int64_t(sizeof(float)));
      auto* floats = reinterpret_cast<float*>(bytes.get());
      view = DeltaArrays{{floats, floats + tail}, tail, memory};
    }
  }

  bool equals(const State& other) const { return !std::memcmp(bytes.get(), other.bytes.get(), nbytes); }
  void take(const State& other) { std::memcpy(bytes.get(), other.bytes.get(), nbytes); }
  void fill(int byte) { std::memset(bytes.get(), byte, nbytes); }

 private:
  void make(int64_t count) {
    bytes = buffer<uint8_t>(count), nbytes = count;
    fill(0);
  }
};

/// What the operations one by one make of a token in one layer.
struct PlainLayer {
  Floats1D in, residual, h, weights, sum;  // before the layer, after the mixer; the weighted sum of its experts
  std::vector<int64_t> experts;
  std::vector<int> tiers;
};

Floats1D plain_linear(const Kernels& isa, const Linear& m, const Floats1D& x) {
  Floats1D y(m.weight.rows);
  linear(isa, m.weight, x.data(), 1, y.data());
  if (m.bias)
    for (size_t i = 0; i < y.size(); ++i) y[i] += m.bias[i];
  return y;
}

Floats1D plain_matmul(const Kernels& isa, const FloatMatrix& m, const Floats1D& x) {
  Floats1D y(m.rows);
  matmul(isa, m.data, false, m.rows, m.cols, x.data(), 1, y.data());
  return y;
}

/// x normalized as the norms of the residual stream are.
Floats1D plain_norm(const Kernels& isa, const LayerWeights& layer, const Norm& norm, const Floats1D& x) {
  Floats1D y(x.size());
  const float *weight = norm.weight.data, *bias = norm.bias.data;
  if (layer.norm_kind == NormKind::rms)
    norms(isa, x.data(), weight, 1, layer.hidden, layer.eps, y.data());
  else
    layer_norms(isa, x.data(), weight, bias, 1, layer.hidden, layer.eps, y.data());
  return y;
}

/// Each n columns normalized by themselves.
Floats1D plain_norm(const Kernels& isa, const LayerWeights& layer, const FloatMatrix& weight, const Floats1D& x) {
  Floats1D y(x.size());
  norms(isa, x.data(), weight.data, int64_t(x.size()) / weight.cols, weight.cols, layer.eps, y.data());
  return y;
}

Floats1D added(const Floats1D& a, const Floats1D& b) {
  Floats1D sum(a.size());
  for (size_t i = 0; i < a.size(); ++i) sum[i] = a[i] + b[i];
  return sum;
}

/// x times one factor for each `x.size() / factors.size()` columns.
Floats1D times(Floats1D x, const Floats1D& factors) {
  const size_t columns = x.size() / factors.size();
  for (size_t i = 0; i < x.size(); ++i) x[i] *= factors[i / columns];
  return x;
}

Floats1D sigmoids(Floats1D x) {
  for (float& value : x) value = 1.0f / (1.0f + exponential(-value));
  return x;
}

Floats1D softpluses(Floats1D x) {
  for (float& value : x) value = std::max(value, 0.0f) + std::log1p(std::exp(-std::fabs(value)));
  return x;
}

void plain_clip(float limit, Floats1D& x) {
  if (limit > 0.0f)
    for (float& value : x) value = std::min(std::max(value, -limit), limit);
}

/// Attention of queries [heads, head_dim] over all that the token sees; that of a prompt of one token is close to it.
Floats1D plain_attend(const Kernels& isa, const AttentionLayer& w, const Floats1D& q, int64_t index,
                      const LayerCache& cache) {
  const int64_t d = w.head_dim, group = w.heads / w.kv_heads;
  int64_t first = w.window ? std::max<int64_t>(0, index + 1 - w.window) : 0;
  if (w.chunk) first = std::max(first, index - index % w.chunk);
  const int64_t count = index + 1 - first;
  Floats1D out(q.size()), prompt(q.size());
  for (int64_t g = 0; g < w.kv_heads; ++g) {
    const auto scores = buffer<float>(group * (count + 1)), rows = buffer<float>(kCacheRows * d);
    isa.attend(q.data() + g * group * d, group, rows_from(cache, g, first, d), count, d,
               w.has_sinks ? w.sinks.data + g * group : nullptr, scores.get(), rows.get(), out.data() + g * group * d);
  }
  attend_prompt(isa, {1, w.heads, w.kv_heads, d, index, w.window, 0, w.chunk, w.sinks.data}, q.data(), cache,
                prompt.data(), nullptr);
  expect(is_close(out, prompt), isa.name, "attention of a token, as of a prompt");
  return out;
}

/// What attention makes of h.
Floats1D plain_mixer(const Kernels& isa, const LayerWeights& layer, const AttentionLayer& w, const Floats1D& h,
                     const Position& position, const LayerState& state) {
  Floats1D q = plain_linear(isa, w.q, h), k = plain_linear(isa, w.k, h), v = plain_linear(isa, w.v, h);
  const auto normalize = [&] { q = plain_norm(isa, layer, w.q_norm, q), k = plain_norm(isa, layer, w.k_norm, k); };
  if (w.qk_norm == QkNorm::full) normalize();
  for (Floats1D* vector : {&q, &k, &v}) plain_clip(w.clip, *vector);
  if (w.qk_norm == QkNorm::head && !w.norm_after_rope) normalize();
  if (w.value_norm) v = plain_norm(isa, layer, w.v_norm, v);
  if (w.rotation >= 0) {
    const Rotation& angles = position.rotations[w.rotation];
    rotate(q.data(), 1, w.heads, w.head_dim, w.turning, angles.cosines, angles.sines);
    rotate(k.data(), 1, w.kv_heads, w.head_dim, w.turning, angles.cosines, angles.sines);
  }
  if (w.qk_norm == QkNorm::head && w.norm_after_rope) normalize();
  if (w.scale != 0.0) q = times(q, {float(w.scale * std::sqrt(double(w.head_dim)))});
  if (w.floor > 0.0f) {
    const float steps = std::floor(float(position.index + 1) / w.floor), more = w.strength * std::log1p(steps);
    q = times(q, {1.0f + more});
  }
  const auto& cache = std::get<LayerCache>(state);
  append(isa, {1, w.heads, w.kv_heads, w.head_dim, position.index, w.window, 0, w.chunk, nullptr}, k.data(), v.data(),
         cache);
  Floats1D y = plain_attend(isa, w, q, position.index, cache);
  if (w.output_gate != OutputGate::none) {
    const Floats1D logits = plain_linear(isa, w.gate, h);
    y = times(y, w.softplus ? softpluses(logits) : sigmoids(logits));
  }
  return plain_linear(isa, w.o, y);
}

/// What the gated delta rule makes of h.
Floats1D plain_mixer(const Kernels& isa, const LayerWeights& layer, const DeltaLayer& w, const Floats1D& h,
                     const Position&, const LayerState& state) {
  const Floats1D mixed = plain_linear(isa, w.qkv, h), rates = plain_matmul(isa, w.ba, h);
  Floats1D y(values_of(w.shape)), z = plain_linear(isa, w.z, h);
  gated_delta(isa, w.shape, 1, mixed.data(), rates.data(), {w.conv.data, w.a_log.data, w.dt_bias.data},
              std::get<DeltaArrays>(state).state, y.data());
  y = plain_norm(isa, layer, w.norm, y);
  activate(isa, kSilu, int64_t(y.size()), y.data(), z.data());
  return plain_linear(isa, w.o, z);
}

/// The residual stream with an output of the layer.
Floats1D plain_joined(const Kernels& isa, const LayerWeights& layer, const Norm& post_norm, const Floats1D& x,
                      const Floats1D& y) {
  const Floats1D normed = layer.post_norms ? plain_norm(isa, layer, post_norm, y) : y;
  return added(x, times(normed, {layer.residual_scale}));
}

/// What experts read.
Floats1D plain_input(const Kernels& isa, const LayerWeights& layer, const Floats1D& x) {
  return layer.pre_norms ? plain_norm(isa, layer, layer.parallel ? layer.attn_norm : layer.mlp_norm, x) : x;
}

/// Chooses experts for the residual stream that the router reads, by `other` if that is given.
void plain_choose(const Kernels& isa, const LayerWeights& layer, const Router* other, PlainLayer& plain) {
  const MoeLayer& moe = *layer.moe();
  const Floats1D& x = layer.parallel ? plain.in : plain.residual;
  const Floats1D ones(layer.hidden, 1.0f);
  const Norm without_weights{{ones.data(), 1, layer.hidden}, {}};
  const Floats1D h = moe.plain_norm ? plain_norm(isa, layer, without_weights, x) : plain_input(isa, layer, x);
  Floats1D logits = plain_matmul(isa, {other ? other->weight : moe.router.data, moe.rule.experts, layer.hidden}, h);
  if (const float* bias = other ? other->bias : moe.router_bias.data)
    for (size_t e = 0; e < logits.size(); ++e) logits[e] += bias[e];
  RouterRule rule = moe.rule;
  rule.select = moe.select.data, rule.weight_scale = moe.scale.data;
  plain.experts.resize(rule.top_k), plain.weights.resize(rule.top_k);
  select_experts(isa, rule, logits.data(), plain.experts.data(), plain.weights.data());
}

void plain_route(const Kernels& isa, const LayerWeights& layer, PlainLayer& plain) {
  plain_choose(isa, layer, nullptr, plain);
  plain.h = plain_input(isa, layer, layer.parallel ? plain.in : plain.residual);
  if (!layer.moe()->scales_input) return;
  plain.h = times(plain.h, {plain.weights[0]});
  plain.weights[0] = 1.0f;
}

Floats1D plain_mlp(const Kernels& isa, const MlpLayer& mlp, const Floats1D& h) {
  const Expert& m = mlp.matrices;
  Floats1D hidden = plain_linear(isa, {m.gate, nullptr}, h), up = plain_linear(isa, {m.up, nullptr}, h);
  activate(isa, kSilu, mlp.width, up.data(), hidden.data());
  return plain_linear(isa, {m.down, nullptr}, hidden);
}

Floats1D plain_shared(const Kernels& isa, const LayerWeights& layer, const SharedLayer& shared, const Floats1D& x) {
  const Floats1D h = shared.own_norms ? plain_norm(isa, layer, shared.norm, x) : plain_input(isa, layer, x);
  Floats1D y = plain_mlp(isa, shared.mlp, h);
  if (shared.own_norms) y = plain_norm(isa, layer, shared.post_norm, y);
  if (shared.gated) y = times(y, sigmoids(plain_matmul(isa, shared.gate, h)));
  return times(y, {shared.scale});
}

Floats1D plain_mix(const Kernels& isa, const LayerWeights& layer, const Floats1D& x, const Position& position,
                   const LayerState& state) {
  const Floats1D h = layer.pre_norms ? plain_norm(isa, layer, layer.attn_norm, x) : x;
  const auto run = [&](const auto& mixer) { return plain_mixer(isa, layer, mixer, h, position, state); };
  Floats1D y = std::visit(run, layer.mixer);
  if (layer.parallel) {
    if (!layer.moe()) y = added(y, plain_mlp(isa, std::get<MlpLayer>(layer.feed_forward), h));
    if (layer.moe() && layer.moe()->shared) y = added(y, plain_shared(isa, layer, *layer.moe()->shared, x));
  }
  return plain_joined(isa, layer, layer.attn_post_norm, x, y);
}

/// The residual stream that leaves a layer, with y the output of its feed-forward part.
Floats1D plain_leave(const Kernels& isa, const LayerWeights& layer, const Floats1D& x, const Floats1D& y) {
  const Floats1D out = plain_joined(isa, layer, layer.mlp_post_norm, x, y);
  return layer.has_scalar ? times(out, {*layer.scalar.data}) : out;
}

/// The residual stream that leaves a layer, with the sum of its experts if it has any.
Floats1D plain_finish(const Kernels& isa, const LayerWeights& layer, const PlainLayer& plain) {
  const Floats1D& x = plain.residual;
  const MoeLayer* moe = layer.moe();
  if (layer.parallel) return moe ? plain_leave(isa, layer, x, plain.sum) : x;
  if (!moe) {
    const auto& mlp = std::get<MlpLayer>(layer.feed_forward);
    return plain_leave(isa, layer, x, plain_mlp(isa, mlp, plain_input(isa, layer, x)));
  }
  if (!moe->shared) return plain_leave(isa, layer, x, plain.sum);
  const bool normed = moe->shared->own_norms;
  const Floats1D y = normed ? plain_norm(isa, layer, moe->shared->experts_post_norm, plain.sum) : plain.sum;
  return plain_leave(isa, layer, x, added(y, plain_shared(isa, layer, *moe->shared, x)));
}

}  // namespace
}  // namespace dymoe

#include "decode/layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/moe.h"
#include "ops/ops.h"
#include "ops/workspace.h"
#include "templates/activate.h"

namespace dymoe {
namespace {

/// Memory of a thread that stays between calls.
struct Workspace {
  QuantizedTokens quantized;
  Buffer<float> h, mixed, attended, added, logits, shared;
  std::vector<float> ones;
};

thread_local Workspace workspace;

/// Returns one token x [n], quantized. It is valid until the next call.
Activations quantized(const Kernels& isa, int64_t n, const float* x) {
  return workspace.quantized.quantize(isa, 1, n, [&](int64_t) { return x; });
}

/// Computes the products of each row of a matrix with x.
void multiply_floats(const Kernels& isa, const float* rows, int64_t count, int64_t n, const float* x, float* out) {
  parallel_ranges(count, 1, count * n / kBlock,
                  [&](int64_t begin, int64_t end) { isa.dots(rows, n, begin, end, x, out); });
}

/// Normalizes x [hidden] into `out`, with weights and a bias, which may be null; `out` may be `x`.
void normalize(const Kernels& isa, const LayerWeights& layer, const float* weight, const float* bias, const float* x,
               float* out) {
  if (layer.norm_kind == NormKind::rms) {
    isa.norm(x, weight, layer.hidden, layer.eps, out);
  } else {
    isa.layer_norm(x, weight, bias, layer.hidden, layer.eps, out);
  }
}

void normalize(const Kernels& isa, const LayerWeights& layer, const Norm& norm, const float* x, float* out) {
  normalize(isa, layer, norm.weight.data, norm.bias.data, x, out);
}

/// Returns x [hidden] normalized into `out`, or x itself if there is no such norm.
const float* normed(const Kernels& isa, const LayerWeights& layer, const Norm& norm, const float* x, float* out) {
  if (!norm.weight.data) return x;
  normalize(isa, layer, norm, x, out);
  return out;
}

/// Normalizes each head of x [heads, n] in place.
void normalize_heads(const Kernels& isa, const float* weight, float eps, int64_t heads, int64_t n, float* x) {
  for (int64_t i = 0; i < heads * n; i += n) isa.norm(x + i, weight, n, eps, x + i);
}

/// Multiplies x [n] by a factor.
void multiply_by(float factor, int64_t n, float* x) {
  if (factor != 1.0f)
    for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

/// Clips x [n] to [-limit, limit], unless limit is 0.
void clip(float limit, int64_t n, float* x) {
  if (limit > 0.0f)
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] < -limit ? -limit : x[i] > limit ? limit : x[i];
}

float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/// Returns log(1 + exp(x)).
float softplus(float x) { return (x < 0.0f ? 0.0f : x) + std::log1p(std::exp(-std::fabs(x))); }

/// Returns the factor of the queries at a position: `query_scale` of gqa.py.
float query_factor(const AttentionLayer& w, int64_t position) {
  const float factor = w.scale == 0.0 ? 1.0f : float(w.scale * std::sqrt(double(w.head_dim)));
  if (w.floor == 0.0f) return factor;
  return factor * (1.0f + w.strength * std::log1p(std::floor(float(position + 1) / w.floor)));
}

/// Normalizes, clips and rotates queries [heads, d], keys and values [kv_heads, d], which follow one another.
void prepare_heads(const Kernels& isa, const AttentionLayer& w, float eps, const Position& position, float* q) {
  const int64_t d = w.head_dim, queries = w.heads * d, keys = w.kv_heads * d;
  float *k = q + queries, *v = k + keys;
  const auto normalize = [&] {
    normalize_heads(isa, w.q_norm.data, eps, w.heads, d, q);
    normalize_heads(isa, w.k_norm.data, eps, w.kv_heads, d, k);
  };
  if (w.qk_norm == QkNorm::full) {
    isa.norm(q, w.q_norm.data, queries, eps, q);
    isa.norm(k, w.k_norm.data, keys, eps, k);
  }
  clip(w.clip, queries + 2 * keys, q);
  if (w.qk_norm == QkNorm::head && !w.norm_after_rope) normalize();
  if (w.value_norm) normalize_heads(isa, w.v_norm.data, eps, w.kv_heads, d, v);
  if (w.rotation >= 0) {
    const auto [cosines, sines] = position.rotations[w.rotation];
    rotate(q, 1, w.heads, d, w.turning, cosines, sines);
    rotate(k, 1, w.kv_heads, d, w.turning, cosines, sines);
  }
  if (w.qk_norm == QkNorm::head && w.norm_after_rope) normalize();
  multiply_by(query_factor(w, position.index), queries, q);
}

/// Multiplies the outputs of attention [heads, head_dim] by factors that the logits of the gate make.
void apply_gate(const AttentionLayer& w, const float* logits, float* out) {
  const auto factor = [&](float logit) { return w.softplus ? softplus(logit) : sigmoid(logit); };
  const int64_t n = w.heads * w.head_dim;
  if (w.output_gate == OutputGate::element) {
    for (int64_t i = 0; i < n; ++i) out[i] *= factor(logits[i]);
  } else {
    for (int64_t h = 0; h < w.heads; ++h) multiply_by(factor(logits[h]), w.head_dim, out + h * w.head_dim);
  }
}

/// Computes the attention of one token h [hidden], out [hidden]. Writes its key and value into the cache.
void mix(const Kernels& isa, const LayerWeights& layer, const AttentionLayer& w, const float* h,
         const Position& position, const LayerState& state, float* out) {
  const int64_t queries = w.heads * w.head_dim, keys = w.kv_heads * w.head_dim;
  const bool has_gate = w.output_gate != OutputGate::none;
  float* q = workspace.mixed.reserve(queries + 2 * keys + w.gate.weight.rows);
  float *k = q + queries, *v = k + keys, *gate = v + keys;
  const Linear* const in[] = {&w.q, &w.k, &w.v, &w.gate};
  multiply(isa, quantized(isa, layer.hidden, h), in, has_gate ? 4 : 3, q);
  prepare_heads(isa, w, layer.eps, position, q);
  const LayerCache& cache = std::get<LayerCache>(state);
  const Prompt one{1, w.heads, w.kv_heads, w.head_dim, position.index, w.window, 0, w.chunk, w.sinks.data};
  append(isa, one, k, v, cache);
  float* attended = workspace.attended.reserve(queries);
  attend_token(isa, one, q, cache, attended);
  if (has_gate) apply_gate(w, gate, attended);
  multiply(isa, quantized(isa, queries, attended), {&w.o}, out);
}

/// Computes the gated delta rule of one token h [hidden], out [hidden], and updates its state.
void mix(const Kernels& isa, const LayerWeights& layer, const DeltaLayer& w, const float* h, const Position& position,
         const LayerState& state, float* out) {
  const DeltaShape& shape = w.shape;
  const int64_t channels = channels_of(shape), values = values_of(shape), rates = 2 * shape.value_heads;
  float* mixed = workspace.mixed.reserve(channels + values + rates);
  float *z = mixed + channels, *ba = z + values;
  multiply(isa, quantized(isa, layer.hidden, h), {&w.qkv, &w.z}, mixed);
  multiply_floats(isa, w.ba.data, rates, layer.hidden, h, ba);
  const DeltaArrays& arrays = std::get<DeltaArrays>(state);
  if (position.index == 0) {
    std::memset(arrays.state.tail, 0, arrays.tail * sizeof(float));
    std::memset(arrays.state.memory, 0, arrays.memory * sizeof(float));
  }
  float* y = workspace.attended.reserve(values);
  gated_delta(isa, shape, 1, mixed, ba, {w.conv.data, w.a_log.data, w.dt_bias.data}, arrays.state, y);
  normalize_heads(isa, w.norm.data, layer.eps, shape.value_heads, shape.value_dim, y);
  activate(isa, {ActivationKind::silu}, values, y, z);
  multiply(isa, quantized(isa, values, z), {&w.o}, out);
}

/// Computes out = x + scale * norm(y), [hidden], with the scale and the norm of outputs that the layer has. `y` is
/// used up; `out` may be `x`.
void add_output(const Kernels& isa, const LayerWeights& layer, const Norm& post_norm, const float* x, float* y,
                float* out) {
  if (post_norm.weight.data) normalize(isa, layer, post_norm, y, y);
  multiply_by(layer.residual_scale, layer.hidden, y);
  for (int64_t i = 0; i < layer.hidden; ++i) out[i] = x[i] + y[i];
}

/// Computes the residual stream that leaves the layer, with y the output of its feed-forward part, which is used up.
void leave(const Kernels& isa, const LayerWeights& layer, const float* x, float* y, float* out) {
  add_output(isa, layer, layer.mlp_post_norm, x, y, out);
  if (layer.has_scalar) multiply_by(*layer.scalar.data, layer.hidden, out);
}

/// Computes the output of a dense MLP, y [hidden], for h [hidden].
void run_mlp(const Kernels& isa, const MlpLayer& mlp, Activation activation, const float* h, float* y) {
  moe(isa, {{mlp.matrices, 0, 1}}, h, nullptr, activation, y);
}

/// Adds the output of a shared expert for h [hidden] to y [hidden], the output of the routed experts.
void add_shared(const Kernels& isa, const LayerWeights& layer, const SharedLayer& shared, Activation activation,
                const float* h, float* y) {
  const int64_t n = layer.hidden;
  float* output = workspace.shared.reserve(n);
  run_mlp(isa, shared.mlp, activation, h, output);
  if (shared.own_norms) {
    normalize(isa, layer, shared.experts_post_norm, y, y);
    normalize(isa, layer, shared.post_norm, output, output);
  }
  if (shared.gated) {
    float logit;
    isa.dots(shared.gate.data, n, 0, 1, h, &logit);
    multiply_by(sigmoid(logit), n, output);
  }
  multiply_by(shared.scale, n, output);
  for (int64_t i = 0; i < n; ++i) y[i] += output[i];
}

/// Adds to y [hidden], what the mixer of a parallel layer makes of h [hidden], what the dense MLP or the shared expert
/// makes of it.
void add_dense_part(const Kernels& isa, const LayerWeights& layer, Activation activation, const float* h, float* y) {
  if (const auto* mlp = std::get_if<MlpLayer>(&layer.feed_forward)) {
    float* output = workspace.shared.reserve(layer.hidden);
    run_mlp(isa, *mlp, activation, h, output);
    for (int64_t i = 0; i < layer.hidden; ++i) y[i] += output[i];
  } else if (const auto& shared = layer.moe()->shared) {
    add_shared(isa, layer, *shared, activation, h, y);
  }
}

/// Returns what the router of a layer reads: its own norm of x, or what the experts read.
const float* router_input(const Kernels& isa, const LayerWeights& layer, const float* x, const float* h, float* out) {
  if (!layer.moe()->plain_norm) return h;
  if (int64_t(workspace.ones.size()) < layer.hidden) workspace.ones.assign(layer.hidden, 1.0f);
  normalize(isa, layer, workspace.ones.data(), nullptr, x, out);
  return out;
}

/// Chooses experts by a router that reads h [hidden].
void choose(const Kernels& isa, const MoeLayer& moe, const Router& router, int64_t hidden, const float* h,
            int64_t* experts, float* weights) {
  RouterRule rule = moe.rule;
  rule.select = moe.select.data, rule.weight_scale = moe.scale.data;
  float* logits = workspace.logits.reserve(rule.experts);
  multiply_floats(isa, router.weight, rule.experts, hidden, h, logits);
  if (router.bias)
    for (int64_t e = 0; e < rule.experts; ++e) logits[e] += router.bias[e];
  select_experts(isa, rule, logits, experts, weights);
}

Router own_router(const MoeLayer& moe) { return {moe.router.data, moe.router_bias.data}; }

}  // namespace

void mix_token(const Kernels& isa, const LayerWeights& layer, Activation activation, const float* x,
               const Position& position, const LayerState& state, float* out) {
  const float* h = normed(isa, layer, layer.attn_norm, x, workspace.h.reserve(layer.hidden));
  float* y = workspace.added.reserve(layer.hidden);
  std::visit([&](const auto& mixer) { mix(isa, layer, mixer, h, position, state, y); }, layer.mixer);
  if (layer.parallel) add_dense_part(isa, layer, activation, h, y);
  add_output(isa, layer, layer.attn_post_norm, x, y, out);
}

void route_token(const Kernels& isa, const LayerWeights& layer, const float* x, float* h, int64_t* experts,
                 float* weights) {
  const MoeLayer& moe = *layer.moe();
  const int64_t n = layer.hidden;
  if (normed(isa, layer, layer.feed_norm(), x, h) == x) std::copy(x, x + n, h);
  choose(isa, moe, own_router(moe), n, router_input(isa, layer, x, h, workspace.h.reserve(n)), experts, weights);
  if (!moe.scales_input) return;
  multiply_by(weights[0], n, h);
  weights[0] = 1.0f;
}

void guess_token(const Kernels& isa, const LayerWeights& layer, const Router* other, const float* x, int64_t* experts,
                 float* weights) {
  const MoeLayer& moe = *layer.moe();
  float* h = workspace.h.reserve(layer.hidden);
  const float* read = moe.plain_norm ? x : normed(isa, layer, layer.feed_norm(), x, h);
  choose(isa, moe, other ? *other : own_router(moe), layer.hidden, router_input(isa, layer, x, read, h), experts,
         weights);
}

void finish_token(const Kernels& isa, const LayerWeights& layer, Activation activation, const float* x, const float* y,
                  float* out) {
  float* added = workspace.added.reserve(layer.hidden);
  std::copy(y, y + layer.hidden, added);
  if (const auto& shared = layer.moe()->shared; shared && !layer.parallel) {
    const Norm& norm = shared->own_norms ? shared->norm : layer.mlp_norm;
    add_shared(isa, layer, *shared, activation, normed(isa, layer, norm, x, workspace.h.reserve(layer.hidden)), added);
  }
  leave(isa, layer, x, added, out);
}

void feed_token(const Kernels& isa, const LayerWeights& layer, Activation activation, const float* x, float* out) {
  const float* h = normed(isa, layer, layer.mlp_norm, x, workspace.h.reserve(layer.hidden));
  float* y = workspace.added.reserve(layer.hidden);
  run_mlp(isa, std::get<MlpLayer>(layer.feed_forward), activation, h, y);
  leave(isa, layer, x, y, out);
}

}  // namespace dymoe

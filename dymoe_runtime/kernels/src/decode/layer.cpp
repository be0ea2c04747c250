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

/// Returns tokens x [tokens, n], quantized. They are valid until the next call.
Activations quantized(const Kernels& isa, int64_t tokens, int64_t n, const float* x) {
  return workspace.quantized.quantize(isa, tokens, n, [&](int64_t t) { return x + t * n; });
}

/// Computes the products of each row of a matrix [count, n] with each token of x [tokens, n]: out [tokens, count].
void multiply_floats(const Kernels& isa, const float* rows, int64_t count, int64_t n, int64_t tokens, const float* x,
                     float* out) {
  parallel_ranges(count, 1, tokens * count * n / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < tokens; ++t) isa.dots(rows, n, begin, end, x + t * n, out + t * count);
  });
}

/// Normalizes each token of x [tokens, hidden] into `out`, with weights and a bias, which may be null; `out` may be
/// `x`.
void normalize(const Kernels& isa, const LayerWeights& layer, const float* weight, const float* bias, int64_t tokens,
               const float* x, float* out) {
  for (const float* stop = x + tokens * layer.hidden; x < stop; x += layer.hidden, out += layer.hidden) {
    if (layer.norm_kind == NormKind::rms) {
      isa.norm(x, weight, layer.hidden, layer.eps, out);
    } else {
      isa.layer_norm(x, weight, bias, layer.hidden, layer.eps, out);
    }
  }
}

void normalize(const Kernels& isa, const LayerWeights& layer, const Norm& norm, int64_t tokens, const float* x,
               float* out) {
  normalize(isa, layer, norm.weight.data, norm.bias.data, tokens, x, out);
}

/// Returns x [tokens, hidden] normalized into `out`, or x itself if there is no such norm.
const float* normed(const Kernels& isa, const LayerWeights& layer, const Norm& norm, int64_t tokens, const float* x,
                    float* out) {
  if (!norm.weight.data) return x;
  normalize(isa, layer, norm, tokens, x, out);
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

/// Computes the attention of one token of each sequence, h [tokens, hidden], out [tokens, hidden]. Writes their keys
/// and values into the caches.
void mix(const Kernels& isa, const LayerWeights& layer, const AttentionLayer& w, const Sequences& sequences,
         const float* h, float* out) {
  const int64_t tokens = sequences.count, queries = w.heads * w.head_dim, keys = w.kv_heads * w.head_dim;
  const bool has_gate = w.output_gate != OutputGate::none;
  const int64_t width = queries + 2 * keys + w.gate.weight.rows;
  float* mixed = workspace.mixed.reserve(tokens * width);
  const Linear* const in[] = {&w.q, &w.k, &w.v, &w.gate};
  multiply(isa, quantized(isa, tokens, layer.hidden, h), in, has_gate ? 4 : 3, mixed);
  float* attended = workspace.attended.reserve(tokens * queries);
  for (int64_t t = 0; t < tokens; ++t) {
    float *q = mixed + t * width, *k = q + queries, *v = k + keys, *gate = v + keys, *y = attended + t * queries;
    const Position& position = sequences.positions[t];
    prepare_heads(isa, w, layer.eps, position, q);
    const LayerCache& cache = std::get<LayerCache>(sequences.state(t));
    const Prompt one{1, w.heads, w.kv_heads, w.head_dim, position.index, w.window, 0, w.chunk, w.sinks.data};
    append(isa, one, k, v, cache);
    attend_token(isa, one, q, cache, y);
    if (has_gate) apply_gate(w, gate, y);
  }
  multiply(isa, quantized(isa, tokens, queries, attended), {&w.o}, out);
}

/// Computes the gated delta rule of one token of each sequence, h [tokens, hidden], out [tokens, hidden], and updates
/// the states.
void mix(const Kernels& isa, const LayerWeights& layer, const DeltaLayer& w, const Sequences& sequences, const float* h,
         float* out) {
  const DeltaShape& shape = w.shape;
  const int64_t tokens = sequences.count, channels = channels_of(shape), values = values_of(shape);
  const int64_t rates = 2 * shape.value_heads, width = channels + values;
  float* mixed = workspace.mixed.reserve(tokens * (width + rates));
  float* ba = mixed + tokens * width;
  multiply(isa, quantized(isa, tokens, layer.hidden, h), {&w.qkv, &w.z}, mixed);
  multiply_floats(isa, w.ba.data, rates, layer.hidden, tokens, h, ba);
  float* gated = workspace.attended.reserve(tokens * values);
  for (int64_t t = 0; t < tokens; ++t) {
    const DeltaArrays& arrays = std::get<DeltaArrays>(sequences.state(t));
    if (sequences.positions[t].index == 0) {
      std::memset(arrays.state.tail, 0, arrays.tail * sizeof(float));
      std::memset(arrays.state.memory, 0, arrays.memory * sizeof(float));
    }
    float *y = gated + t * values, *z = mixed + t * width + channels;
    gated_delta(isa, shape, 1, mixed + t * width, ba + t * rates, {w.conv.data, w.a_log.data, w.dt_bias.data},
                arrays.state, y);
    normalize_heads(isa, w.norm.data, layer.eps, shape.value_heads, shape.value_dim, y);
    activate(isa, {ActivationKind::silu}, values, y, z);
    std::copy(z, z + values, y);
  }
  multiply(isa, quantized(isa, tokens, values, gated), {&w.o}, out);
}

/// Computes out = x + scale * norm(y), [tokens, hidden], with the scale and the norm of outputs that the layer has. `y`
/// is used up; `out` may be `x`.
void add_output(const Kernels& isa, const LayerWeights& layer, const Norm& post_norm, int64_t tokens, const float* x,
                float* y, float* out) {
  const int64_t n = tokens * layer.hidden;
  if (post_norm.weight.data) normalize(isa, layer, post_norm, tokens, y, y);
  multiply_by(layer.residual_scale, n, y);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] + y[i];
}

/// Computes the residual streams that leave the layer, with y the output of its feed-forward part, which is used up.
void leave(const Kernels& isa, const LayerWeights& layer, int64_t tokens, const float* x, float* y, float* out) {
  add_output(isa, layer, layer.mlp_post_norm, tokens, x, y, out);
  if (layer.has_scalar) multiply_by(*layer.scalar.data, tokens * layer.hidden, out);
}

/// Computes the output of a dense MLP, y [tokens, hidden], for h [tokens, hidden].
void run_mlp(const Kernels& isa, const MlpLayer& mlp, Activation activation, int64_t tokens, const float* h, float* y) {
  moe(isa, {{mlp.matrices, 0, tokens}}, h, nullptr, activation, y);
}

/// Adds the output of a shared expert for h [tokens, hidden] to y [tokens, hidden], the output of the routed experts.
void add_shared(const Kernels& isa, const LayerWeights& layer, const SharedLayer& shared, Activation activation,
                int64_t tokens, const float* h, float* y) {
  const int64_t n = layer.hidden;
  float* output = workspace.shared.reserve(tokens * n);
  run_mlp(isa, shared.mlp, activation, tokens, h, output);
  if (shared.own_norms) {
    normalize(isa, layer, shared.experts_post_norm, tokens, y, y);
    normalize(isa, layer, shared.post_norm, tokens, output, output);
  }
  for (int64_t t = 0; shared.gated && t < tokens; ++t) {
    float logit;
    isa.dots(shared.gate.data, n, 0, 1, h + t * n, &logit);
    multiply_by(sigmoid(logit), n, output + t * n);
  }
  multiply_by(shared.scale, tokens * n, output);
  for (int64_t i = 0; i < tokens * n; ++i) y[i] += output[i];
}

/// Adds to y [tokens, hidden], what the mixer of a parallel layer makes of h [tokens, hidden], what the dense MLP or
/// the shared expert makes of it.
void add_dense_part(const Kernels& isa, const LayerWeights& layer, Activation activation, int64_t tokens,
                    const float* h, float* y) {
  if (const auto* mlp = std::get_if<MlpLayer>(&layer.feed_forward)) {
    float* output = workspace.shared.reserve(tokens * layer.hidden);
    run_mlp(isa, *mlp, activation, tokens, h, output);
    for (int64_t i = 0; i < tokens * layer.hidden; ++i) y[i] += output[i];
  } else if (const auto& shared = layer.moe()->shared) {
    add_shared(isa, layer, *shared, activation, tokens, h, y);
  }
}

/// Returns what the router of a layer reads: its own norm of x, or what the experts read.
const float* router_input(const Kernels& isa, const LayerWeights& layer, int64_t tokens, const float* x, const float* h,
                          float* out) {
  if (!layer.moe()->plain_norm) return h;
  if (int64_t(workspace.ones.size()) < layer.hidden) workspace.ones.assign(layer.hidden, 1.0f);
  normalize(isa, layer, workspace.ones.data(), nullptr, tokens, x, out);
  return out;
}

/// Chooses experts by a router that reads h [tokens, hidden]: experts and weights [tokens, top_k].
void choose(const Kernels& isa, const MoeLayer& moe, const Router& router, int64_t hidden, int64_t tokens,
            const float* h, int64_t* experts, float* weights) {
  RouterRule rule = moe.rule;
  rule.select = moe.select.data, rule.weight_scale = moe.scale.data;
  float* logits = workspace.logits.reserve(tokens * rule.experts);
  multiply_floats(isa, router.weight, rule.experts, hidden, tokens, h, logits);
  for (int64_t t = 0; t < tokens; ++t, logits += rule.experts, experts += rule.top_k, weights += rule.top_k) {
    if (router.bias)
      for (int64_t e = 0; e < rule.experts; ++e) logits[e] += router.bias[e];
    select_experts(isa, rule, logits, experts, weights);
  }
}

Router own_router(const MoeLayer& moe) { return {moe.router.data, moe.router_bias.data}; }

}  // namespace

void mix_tokens(const Kernels& isa, const LayerWeights& layer, Activation activation, const Sequences& sequences,
                const float* x, float* out) {
  const int64_t tokens = sequences.count;
  const float* h = normed(isa, layer, layer.attn_norm, tokens, x, workspace.h.reserve(tokens * layer.hidden));
  float* y = workspace.added.reserve(tokens * layer.hidden);
  std::visit([&](const auto& mixer) { mix(isa, layer, mixer, sequences, h, y); }, layer.mixer);
  if (layer.parallel) add_dense_part(isa, layer, activation, tokens, h, y);
  add_output(isa, layer, layer.attn_post_norm, tokens, x, y, out);
}

void route_tokens(const Kernels& isa, const LayerWeights& layer, int64_t tokens, const float* x, float* h,
                  int64_t* experts, float* weights) {
  const MoeLayer& moe = *layer.moe();
  const int64_t n = layer.hidden;
  if (normed(isa, layer, layer.feed_norm(), tokens, x, h) == x) std::copy(x, x + tokens * n, h);
  const float* read = router_input(isa, layer, tokens, x, h, workspace.h.reserve(tokens * n));
  choose(isa, moe, own_router(moe), n, tokens, read, experts, weights);
  if (!moe.scales_input) return;
  for (int64_t t = 0; t < tokens; ++t) {
    float& weight = weights[t * moe.rule.top_k];
    multiply_by(weight, n, h + t * n);
    weight = 1.0f;
  }
}

void guess_token(const Kernels& isa, const LayerWeights& layer, const Router* other, const float* x, int64_t* experts,
                 float* weights) {
  const MoeLayer& moe = *layer.moe();
  float* h = workspace.h.reserve(layer.hidden);
  const float* read = moe.plain_norm ? x : normed(isa, layer, layer.feed_norm(), 1, x, h);
  choose(isa, moe, other ? *other : own_router(moe), layer.hidden, 1, router_input(isa, layer, 1, x, read, h), experts,
         weights);
}

void finish_tokens(const Kernels& isa, const LayerWeights& layer, Activation activation, int64_t tokens, const float* x,
                   const float* y, float* out) {
  const int64_t n = tokens * layer.hidden;
  float* added = workspace.added.reserve(n);
  std::copy(y, y + n, added);
  if (const auto& shared = layer.moe()->shared; shared && !layer.parallel) {
    const Norm& norm = shared->own_norms ? shared->norm : layer.mlp_norm;
    const float* h = normed(isa, layer, norm, tokens, x, workspace.h.reserve(n));
    add_shared(isa, layer, *shared, activation, tokens, h, added);
  }
  leave(isa, layer, tokens, x, added, out);
}

void feed_tokens(const Kernels& isa, const LayerWeights& layer, Activation activation, int64_t tokens, const float* x,
                 float* out) {
  const float* h = normed(isa, layer, layer.mlp_norm, tokens, x, workspace.h.reserve(tokens * layer.hidden));
  float* y = workspace.added.reserve(tokens * layer.hidden);
  run_mlp(isa, std::get<MlpLayer>(layer.feed_forward), activation, tokens, h, y);
  leave(isa, layer, tokens, x, y, out);
}

}  // namespace dymoe

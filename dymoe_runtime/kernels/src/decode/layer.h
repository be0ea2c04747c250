// The attention and the router of one layer, for one decoded token.
#pragma once

#include "ops/attention.h"

namespace dymoe {

/// A quantized matrix with a bias.
struct Linear {
  MatrixView weight;
  const float* bias;  // [rows], or null for none
};

/// How queries and keys are normalized: not at all, each head by itself, or all heads as one vector.
enum class QkNorm { none, head, full };

/// The position of a token, and the rotary embedding there.
struct Position {
  int64_t index;
  const float *cosines, *sines;  // [head_dim] each
};

/// The weights of a router.
struct Router {
  const float *weight, *bias;  // [experts, hidden]; [experts], or null for none
};

/// The dense weights of one layer. The caller keeps the memory of all pointers.
struct LayerWeights {
  int64_t hidden, heads, kv_heads, head_dim;
  int64_t window;          // positions that a token sees, itself included; 0 for all
  int64_t experts, top_k;  // 0 for a layer without a router
  float eps, clip;         // clip: largest magnitude of queries, keys and values; 0 for no limit
  QkNorm qk_norm;
  bool normalize;  // whether routing weights are divided by their sum
  // attn_norm and mlp_norm are [hidden]; q_norm and k_norm are [head_dim], or of all heads for QkNorm::full.
  const float *attn_norm, *q_norm, *k_norm, *mlp_norm;
  Router router;
  Linear q, k, v, o;
};

/// Throws std::invalid_argument if the sizes of a layer contradict each other or the shapes of its matrices.
void check(const LayerWeights& layer);

/// Computes out = s + attention(norm(s)), [hidden], with s = x + more, or s = x if `more` is null. `out` may be `x` or
/// `more`. Writes the token's key and value into the cache at its position.
void attend_token(const Kernels& isa, const LayerWeights& layer, const float* x, const float* more,
                  const Position& position, const LayerCache& cache, float* out);

/// Computes h = norm(x), [hidden], and chooses the experts by `router`. Writes experts and routing weights, [top_k]
/// each, highest weight first.
void route_token(const Kernels& isa, const LayerWeights& layer, const Router& router, const float* x, float* h,
                 int64_t* experts, float* weights);

}  // namespace dymoe

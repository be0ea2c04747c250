// Attention and routing of one decoded token, a layer a call.
#pragma once

#include "attention.h"

namespace dymoe {

struct Linear {
  MatrixView weight;
  const float* bias;  // null for none
};

enum class QkNorm { none, head, full };

/// One layer's dense weights; all pointers stay the caller's.
struct LayerWeights {
  int64_t hidden, heads, kv_heads, head_dim;
  int64_t window;  // positions that a token sees, 0 for all
  int64_t experts, top_k;  // 0 where the layer does not route
  float eps, clip;         // clip: 0 for none
  QkNorm qk_norm;
  bool norm_topk;
  const float *attn_norm, *q_norm, *k_norm, *mlp_norm;
  const float* router;  // [experts, hidden]
  Linear q, k, v, o;
};

/// out = x + attention(norm(x)), [hidden]; the token's key and value go into the cache at `position`.
/// x is `x` plus, unless null, `more`; out may be either. cosines and sines are those of the position, [head_dim].
void attend(const Kernels& isa, const LayerWeights& layer, const float* x, const float* more, int64_t position,
            const float* cosines, const float* sines, const LayerCache& cache, float* out);

/// The experts of the `top_k` highest of `count` logits and their gates by falling gate: their shares of the softmax,
/// with `norm_topk` made to sum to 1. The logits are used up.
void choose(const Kernels& isa, float* logits, int64_t count, int64_t top_k, bool norm_topk, int64_t* experts,
            float* gates);

struct Router {
  const float *weight, *bias;  // [experts, hidden], and [experts] or null
};

/// h = norm(x), [hidden]; the experts that `router` chooses and their gates, [top_k], by falling gate.
void route(const Kernels& isa, const LayerWeights& layer, const Router& router, const float* x, float* h,
           int64_t* experts, float* gates);

}  // namespace dymoe

// The dense weights of one layer, for a decoded token. spec.py describes what each option of a layer does.
#pragma once

#include <cstdint>
#include <optional>
#include <variant>

#include "ops/delta.h"
#include "ops/linear.h"
#include "ops/router.h"
#include "record/expert.h"

namespace dymoe {

/// A tensor that is not quantized, [rows, cols]; a vector has one row. One that a layer does not have is empty.
struct FloatMatrix {
  const float* data = nullptr;
  int64_t rows = 0, cols = 0;
};

/// A norm of the residual stream, or of what a layer adds to it, [hidden]. The bias is empty for a norm without one.
struct Norm {
  FloatMatrix weight, bias;
};

/// What all such norms of a model are.
enum class NormKind { rms, layer, layer_bias };

/// How queries and keys are normalized: not at all, each head by itself, or all heads as one vector.
enum class QkNorm { none, head, full };

/// What multiplies the outputs of attention: nothing, one factor for each value, or one for each head.
enum class OutputGate { none, element, head };

/// Grouped-query attention, as AttentionSpec of spec.py.
struct AttentionLayer {
  int64_t heads, kv_heads, head_dim;
  int64_t window, chunk;  // of the positions that a token sees, its own included; 0 for all
  int64_t rotation;       // index of the layer's rotary embedding in a Position; -1 for none
  int64_t turning;        // leading columns of a head that turn
  QkNorm qk_norm;
  OutputGate output_gate;
  bool bias, output_bias, norm_after_rope, value_norm, has_sinks;
  bool softplus;          // what makes factors of the gate, instead of the sigmoid
  float clip;             // largest magnitude of queries, keys and values; 0 for no limit
  double scale;           // of the scores; 0 for 1 / sqrt(head_dim)
  float floor, strength;  // the pair `temperature` of spec.py; floor 0 for none
  // q_norm and k_norm are [head_dim], or of all heads for QkNorm::full; v_norm is [head_dim], sinks is [heads].
  FloatMatrix q_norm, k_norm, v_norm, sinks;
  Linear q, k, v, o, gate;
};

/// The gated delta rule, as GatedDeltaSpec of spec.py.
struct DeltaLayer {
  DeltaShape shape;
  FloatMatrix ba, conv, a_log, dt_bias, norm;  // [2 * value_heads, hidden]; [channels, taps]; ..; [value_dim]
  Linear qkv, z, o;
};

/// A dense MLP.
struct MlpLayer {
  int64_t width;
  Expert matrices;
};

/// A shared expert, as SharedSpec of spec.py.
struct SharedLayer {
  MlpLayer mlp;
  bool gated, own_norms;
  float scale;
  FloatMatrix gate;  // [hidden]
  Norm norm, post_norm, experts_post_norm;
};

/// The router of routed experts, as RouterSpec of spec.py, and the shared expert.
struct MoeLayer {
  RouterRule rule;  // without its pointers, which are those of `select` and `scale`
  bool bias, selection_bias, expert_scale, plain_norm, scales_input;
  FloatMatrix router, router_bias, select, scale;  // [experts, hidden]; [experts] each
  std::optional<SharedLayer> shared;
};

/// The dense weights of one layer, as LayerSpec of spec.py. The caller keeps the memory of all pointers.
struct LayerWeights {
  int64_t hidden;
  NormKind norm_kind;
  float eps;  // of all norms
  bool pre_norms, post_norms, has_scalar, parallel;
  float residual_scale;
  Norm attn_norm, attn_post_norm, mlp_norm, mlp_post_norm;
  FloatMatrix scalar;  // [1]
  std::variant<AttentionLayer, DeltaLayer> mixer;
  std::variant<MlpLayer, MoeLayer> feed_forward;

  /// Returns the routed experts of the layer, or null if it has none.
  const MoeLayer* moe() const { return std::get_if<MoeLayer>(&feed_forward); }

  /// Returns the norm through which the feed-forward part reads the residual stream.
  const Norm& feed_norm() const { return parallel ? attn_norm : mlp_norm; }
};

/// Throws std::invalid_argument if the numbers of a layer contradict each other, or the shapes of its tensors.
void check(const LayerWeights& layer);

}  // namespace dymoe

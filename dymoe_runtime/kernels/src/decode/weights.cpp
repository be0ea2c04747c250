#include "decode/weights.h"

#include <stdexcept>
#include <string>

namespace dymoe {
namespace {

std::string text_of(int64_t rows, int64_t cols) { return std::to_string(rows) + " x " + std::to_string(cols); }

/// Throws std::invalid_argument unless a tensor has these rows and columns; a layer that does not want it has none.
void expect(const char* name, bool wanted, int64_t rows, int64_t cols, int64_t found_rows, int64_t found_cols) {
  if (!wanted) rows = cols = 0;
  if (found_rows != rows || found_cols != cols)
    throw std::invalid_argument(std::string(name) + ": expected " + text_of(rows, cols) + ", got " +
                                text_of(found_rows, found_cols));
}

void expect(const char* name, const FloatMatrix& m, bool wanted, int64_t rows, int64_t cols) {
  expect(name, wanted, rows, cols, m.rows, m.cols);
}

void expect(const char* name, const MatrixView& m, int64_t rows, int64_t cols) {
  expect(name, true, rows, cols, m.rows, m.cols);
}

void expect(const char* name, const Linear& m, bool wanted, int64_t rows, int64_t cols, bool has_bias) {
  expect(name, wanted, rows, cols, m.weight.rows, m.weight.cols);
  if ((m.bias != nullptr) != has_bias) throw std::invalid_argument(std::string(name) + ": its bias is unexpected");
}

/// Throws std::invalid_argument unless a norm is as the layer wants it.
void expect(const char* name, const Norm& norm, bool wanted, const LayerWeights& layer) {
  expect(name, norm.weight, wanted, 1, layer.hidden);
  expect(name, norm.bias, wanted && layer.norm_kind == NormKind::layer_bias, 1, layer.hidden);
}

void expect(bool fits, const char* message) {
  if (!fits) throw std::invalid_argument(message);
}

void check_mixer(const AttentionLayer& w, int64_t hidden) {
  expect(w.heads >= 1 && w.kv_heads >= 1 && w.heads % w.kv_heads == 0 && w.head_dim >= 2 && w.head_dim % 2 == 0,
         "the heads do not fit");
  expect(w.rotation < 0 || (w.turning >= 2 && w.turning <= w.head_dim && w.turning % 2 == 0),
         "the columns that turn do not fit");
  expect(w.window >= 0 && w.chunk >= 0 && w.floor >= 0, "what a token sees is not positive");
  const int64_t queries = w.heads * w.head_dim, keys = w.kv_heads * w.head_dim;
  const bool is_full = w.qk_norm == QkNorm::full, has_gate = w.output_gate != OutputGate::none;
  expect("attn.q", w.q, true, queries, hidden, w.bias);
  expect("attn.k", w.k, true, keys, hidden, w.bias);
  expect("attn.v", w.v, true, keys, hidden, w.bias);
  expect("attn.o", w.o, true, hidden, queries, w.output_bias);
  expect("attn.gate", w.gate, has_gate, w.output_gate == OutputGate::element ? queries : w.heads, hidden, false);
  expect("attn.q_norm", w.q_norm, w.qk_norm != QkNorm::none, 1, is_full ? queries : w.head_dim);
  expect("attn.k_norm", w.k_norm, w.qk_norm != QkNorm::none, 1, is_full ? keys : w.head_dim);
  expect("attn.v_norm", w.v_norm, w.value_norm, 1, w.head_dim);
  expect("attn.sinks", w.sinks, w.has_sinks, 1, w.heads);
}

void check_mixer(const DeltaLayer& w, int64_t hidden) {
  const DeltaShape& shape = w.shape;
  check(shape);
  expect("delta.qkv", w.qkv, true, channels_of(shape), hidden, false);
  expect("delta.z", w.z, true, values_of(shape), hidden, false);
  expect("delta.o", w.o, true, hidden, values_of(shape), false);
  expect("delta.ba_exact", w.ba, true, 2 * shape.value_heads, hidden);
  expect("delta.conv_exact", w.conv, true, channels_of(shape), shape.taps);
  expect("delta.a_log", w.a_log, true, 1, shape.value_heads);
  expect("delta.dt_bias", w.dt_bias, true, 1, shape.value_heads);
  expect("delta.norm", w.norm, true, 1, shape.value_dim);
}

void check_mlp(const MlpLayer& w, int64_t hidden) {
  expect(w.width >= 1, "a dense MLP has no width");
  expect("gate", w.matrices.gate, w.width, hidden);
  expect("up", w.matrices.up, w.width, hidden);
  expect("down", w.matrices.down, hidden, w.width);
}

void check_feed_forward(const MlpLayer& w, const LayerWeights& layer) { check_mlp(w, layer.hidden); }

void check_feed_forward(const MoeLayer& w, const LayerWeights& layer) {
  const int64_t hidden = layer.hidden;
  check(w.rule);
  expect(!w.scales_input || w.rule.top_k == 1, "a routing weight multiplies the input of one expert");
  expect("router", w.router, true, w.rule.experts, hidden);
  expect("router_bias", w.router_bias, w.bias, 1, w.rule.experts);
  expect("router_select", w.select, w.selection_bias, 1, w.rule.experts);
  expect("router_scale", w.scale, w.expert_scale, 1, w.rule.experts);
  if (!w.shared) return;
  const SharedLayer& shared = *w.shared;
  check_mlp(shared.mlp, hidden);
  expect("shared_gate", shared.gate, shared.gated, 1, hidden);
  expect(!layer.parallel || !shared.own_norms, "a parallel layer has one norm");
  expect("shared_norm", shared.norm, shared.own_norms, layer);
  expect("shared_post_norm", shared.post_norm, shared.own_norms, layer);
  expect("experts_post_norm", shared.experts_post_norm, shared.own_norms, layer);
}

}  // namespace

void check(const LayerWeights& layer) {
  const int64_t hidden = layer.hidden;
  expect(hidden >= 1, "a layer has no width");
  expect(!layer.parallel || (layer.pre_norms && !layer.post_norms && !layer.has_scalar),
         "a parallel layer has one norm, and no scalar");
  expect("attn_norm", layer.attn_norm, layer.pre_norms, layer);
  expect("mlp_norm", layer.mlp_norm, layer.pre_norms && !layer.parallel, layer);
  expect("attn_post_norm", layer.attn_post_norm, layer.post_norms, layer);
  expect("mlp_post_norm", layer.mlp_post_norm, layer.post_norms, layer);
  expect("scalar", layer.scalar, layer.has_scalar, 1, 1);
  std::visit([&](const auto& mixer) { check_mixer(mixer, hidden); }, layer.mixer);
  std::visit([&](const auto& part) { check_feed_forward(part, layer); }, layer.feed_forward);
}

}  // namespace dymoe

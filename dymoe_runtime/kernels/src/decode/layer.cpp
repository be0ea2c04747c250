#include "decode/layer.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "ops/ops.h"
#include "ops/router.h"
#include "ops/workspace.h"

namespace dymoe {
namespace {

/// Memory of a thread that stays between calls.
struct Workspace {
  QuantizedTokens quantized;
  Buffer<float> residual, h, heads, attended, scores, logits;
};

thread_local Workspace workspace;

/// Multiplies one quantized token by each of `weights` and adds the biases. y holds the results one after another.
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

/// Clips x [n] to [-limit, limit], unless limit is 0.
void clip(float limit, int64_t n, float* x) {
  if (limit > 0.0f)
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] < -limit ? -limit : x[i] > limit ? limit : x[i];
}

/// Normalizes and clips queries or keys x [heads, head_dim], as the layer's qk_norm and clip say.
void normalize_heads(const Kernels& isa, const LayerWeights& layer, const float* weight, int64_t heads, float* x) {
  const int64_t n = heads * layer.head_dim;
  if (layer.qk_norm == QkNorm::full) isa.norm(x, weight, n, layer.eps, x);
  clip(layer.clip, n, x);
  if (layer.qk_norm == QkNorm::head)
    for (int64_t i = 0; i < n; i += layer.head_dim) isa.norm(x + i, weight, layer.head_dim, layer.eps, x + i);
}

bool has_shape(const Linear& m, int64_t rows, int64_t cols) { return m.weight.rows == rows && m.weight.cols == cols; }

}  // namespace

void check(const LayerWeights& w) {
  if (w.heads < 1 || w.kv_heads < 1 || w.heads % w.kv_heads || w.head_dim < 2 || w.head_dim % 2 || w.top_k > w.experts)
    throw std::invalid_argument("heads and experts do not fit");
  const int64_t queries = w.heads * w.head_dim, keys = w.kv_heads * w.head_dim;
  if (!has_shape(w.q, queries, w.hidden) || !has_shape(w.k, keys, w.hidden) || !has_shape(w.v, keys, w.hidden) ||
      !has_shape(w.o, w.hidden, queries))
    throw std::invalid_argument("the shapes of the attention's matrices do not match");
}

void attend_token(const Kernels& isa, const LayerWeights& layer, const float* x, const float* more,
                  const Position& position, const LayerCache& cache, float* out) {
  const int64_t d = layer.head_dim, queries = layer.heads * d, keys = layer.kv_heads * d;
  float* h = workspace.h.reserve(layer.hidden);
  float* q = workspace.heads.reserve(queries + 2 * keys);
  float *k = q + queries, *v = k + keys;
  float* residual = workspace.residual.reserve(layer.hidden);
  for (int64_t i = 0; i < layer.hidden; ++i) residual[i] = more ? x[i] + more[i] : x[i];
  isa.norm(residual, layer.attn_norm, layer.hidden, layer.eps, h);
  multiply(isa, workspace.quantized.quantize(isa, 1, layer.hidden, [&](int64_t) { return h; }),
           {&layer.q, &layer.k, &layer.v}, q);
  normalize_heads(isa, layer, layer.q_norm, layer.heads, q);
  normalize_heads(isa, layer, layer.k_norm, layer.kv_heads, k);
  clip(layer.clip, keys, v);
  rotate(q, 1, layer.heads, d, position.cosines, position.sines);
  rotate(k, 1, layer.kv_heads, d, position.cosines, position.sines);
  append(isa, {1, layer.heads, layer.kv_heads, d, position.index, layer.window, 0}, k, v, cache);

  const int64_t first = layer.window ? std::max<int64_t>(0, position.index + 1 - layer.window) : 0;
  const int64_t count = position.index + 1 - first, group = layer.heads / layer.kv_heads;
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

void route_token(const Kernels& isa, const LayerWeights& layer, const Router& router, const float* x, float* h,
                 int64_t* experts, float* weights) {
  isa.norm(x, layer.mlp_norm, layer.hidden, layer.eps, h);
  float* logits = workspace.logits.reserve(layer.experts);
  parallel_ranges(layer.experts, 1, layer.experts * layer.hidden / kBlock,
                  [&](int64_t begin, int64_t end) { isa.dots(router.weight, layer.hidden, begin, end, h, logits); });
  if (router.bias)
    for (int64_t e = 0; e < layer.experts; ++e) logits[e] += router.bias[e];
  select_experts(isa, logits, layer.experts, layer.top_k, layer.normalize, experts, weights);
}

}  // namespace dymoe

#include "ops/delta.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "ops/workspace.h"

namespace dymoe {
namespace {

constexpr int64_t kGroupTokens = 64;  // tokens at a time, so that queries, keys and values stay in the cache
constexpr float kUnitEps = 1e-6f;     // added to the sum of squares of queries and keys

/// Returns log(1 + exp(x)).
float softplus(float x) { return x > 0.0f ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

/// Keeps the last inputs of the convolution, of which the first may be older than this call.
void keep_tail(const DeltaShape& s, int64_t tokens, const float* mixed, float* tail) {
  const int64_t rows = s.taps - 1, channels = channels_of(s), old = std::max<int64_t>(0, rows - tokens);
  if (!rows || !tokens) return;
  std::memmove(tail, tail + (rows - old) * channels, old * channels * sizeof(float));
  std::memcpy(tail + old * channels, mixed + (tokens - rows + old) * channels, (rows - old) * channels * sizeof(float));
}

/// Divides x [n] by its length and multiplies it by `factor`.
void make_unit(const Kernels& isa, int64_t n, float factor, float* x) {
  float squares;
  isa.dots(x, n, 0, 1, x, &squares);
  const float size = factor / std::sqrt(squares + kUnitEps);
  for (int64_t i = 0; i < n; ++i) x[i] *= size;
}

/// The arguments of `gated_delta`.
struct Call {
  const Kernels& isa;
  const DeltaShape& shape;
  int64_t tokens;
  const float *mixed, *rates;
  const DeltaWeights& weights;
  const DeltaState& state;
  float* y;

  /// Runs all tokens through head `h` of values, a group of tokens at a time.
  void run_head(int64_t h) const {
    thread_local Buffer<float> buffer;
    const int64_t most = std::min(tokens, kGroupTokens), width = 2 * shape.key_dim + shape.value_dim;
    float* columns = buffer.reserve(shape.key_dim * kDeltaColumns + most * (width + 2));
    float *turned = columns + shape.key_dim * kDeltaColumns, *fades = turned + most * width, *shares = fades + most;
    for (int64_t first = 0; first < tokens; first += most) {
      const int64_t count = std::min(most, tokens - first);
      convolve(h, first, count, turned);
      rate(h, first, count, fades, shares);
      const DeltaHead head{count,
                           shape.key_dim,
                           shape.value_dim,
                           turned,
                           turned + shape.key_dim,
                           turned + 2 * shape.key_dim,
                           width,
                           fades,
                           shares,
                           state.memory + h * shape.key_dim * shape.value_dim,
                           y + first * values_of(shape) + h * shape.value_dim,
                           values_of(shape)};
      isa.delta(head, columns);
    }
  }

  /// Convolves the queries, keys and values of a head to turned [count, 2 * key_dim + value_dim], and makes units of
  /// queries and keys. Heads that share a head of keys do that each for itself, so that they need not wait.
  void convolve(int64_t h, int64_t first, int64_t count, float* turned) const {
    const int64_t n = shape.key_dim, keys = shape.key_heads * n, width = 2 * n + shape.value_dim;
    const int64_t query = h * shape.key_heads / shape.value_heads * n, value = 2 * keys + h * shape.value_dim;
    Convolution c{first, count, channels_of(shape), shape.taps, state.tail, mixed, weights.conv, turned, width};
    isa.convolve(c, query, query + n);
    c.out = turned + n;
    isa.convolve(c, keys + query, keys + query + n);
    c.out = turned + 2 * n;
    isa.convolve(c, value, value + shape.value_dim);
    for (int64_t t = 0; t < count; ++t) {
      make_unit(isa, n, 1.0f / std::sqrt(float(n)), turned + t * width);
      make_unit(isa, n, 1.0f, turned + t * width + n);
    }
  }

  /// Computes what memory keeps, and the share of a change that it takes on, for each token.
  void rate(int64_t h, int64_t first, int64_t count, float* fades, float* shares) const {
    const int64_t heads = shape.value_heads;
    const float speed = std::exp(weights.a_log[h]);
    for (int64_t t = 0; t < count; ++t) {
      const float* of_token = rates + (first + t) * 2 * heads;
      shares[t] = 1.0f / (1.0f + std::exp(-of_token[h]));
      fades[t] = std::exp(-speed * softplus(of_token[heads + h] + weights.dt_bias[h]));
    }
  }
};

}  // namespace

void check(const DeltaShape& s) {
  if (s.key_heads < 1 || s.value_heads < 1 || s.value_heads % s.key_heads || s.key_dim < 1 || s.value_dim < 1 ||
      s.taps < 1 || s.taps > kMaxTaps)
    throw std::invalid_argument("a gated delta rule: its heads and taps do not fit");
}

void gated_delta(const Kernels& isa, const DeltaShape& shape, int64_t tokens, const float* mixed, const float* rates,
                 const DeltaWeights& weights, const DeltaState& state, float* y) {
  const Call call{isa, shape, tokens, mixed, rates, weights, state, y};
  const int64_t of_head = shape.key_dim * shape.value_dim / kBlock * kFloatWork;
  parallel_ranges(shape.value_heads, 1, tokens * shape.value_heads * of_head, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) call.run_head(h);
  });
  keep_tail(shape, tokens, mixed, state.tail);
}

}  // namespace dymoe

// The gated delta rule (Gated DeltaNet, arXiv 2412.06464) behind a causal convolution.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dymoe {

/// The shape of a gated delta rule, as GatedDeltaSpec of spec.py.
struct DeltaShape {
  int64_t key_heads, value_heads, key_dim, value_dim;
  int64_t taps;  // inputs that the convolution of a token sees, its own included
};

/// Returns the floats of all values of a token, of which y has as many.
constexpr int64_t values_of(const DeltaShape& shape) { return shape.value_heads * shape.value_dim; }

/// Returns the floats that pass the convolution for a token: queries, keys and values.
constexpr int64_t channels_of(const DeltaShape& shape) {
  return 2 * shape.key_heads * shape.key_dim + values_of(shape);
}

/// The small tensors of a gated delta rule. The caller keeps the memory.
struct DeltaWeights {
  const float *conv, *a_log, *dt_bias;  // [channels, taps], [value_heads], [value_heads]
};

/// The state of a sequence, all zeros before its first token. The caller keeps the memory.
struct DeltaState {
  float *tail, *memory;  // [taps - 1, channels], [value_heads, key_dim, value_dim]
};

/// Throws std::invalid_argument if the numbers of a shape contradict each other.
void check(const DeltaShape& shape);

/// Runs tokens through the convolution and the gated delta rule, as `Kernels.gated_delta` of interface.py says, and
/// updates the state. mixed is [tokens, channels], rates [tokens, 2 * value_heads], y [tokens, values].
void gated_delta(const Kernels& isa, const DeltaShape& shape, int64_t tokens, const float* mixed, const float* rates,
                 const DeltaWeights& weights, const DeltaState& state, float* y);

}  // namespace dymoe

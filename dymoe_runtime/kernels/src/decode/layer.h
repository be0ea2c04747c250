// The operations of one layer outside its routed experts, for one decoded token.
#pragma once

#include <variant>
#include <vector>

#include "decode/weights.h"
#include "ops/attention.h"

namespace dymoe {

/// A rotary embedding at the position of a token.
struct Rotation {
  const float *cosines, *sines;  // by column that turns
};

/// The position of a token, and the rotary embeddings of the model there.
struct Position {
  int64_t index;
  std::vector<Rotation> rotations;
};

/// The state of a gated delta rule, and the floats of its arrays.
struct DeltaArrays {
  DeltaState state;
  int64_t tail, memory;
};

/// The state that a layer keeps of a sequence; none for a layer that the caller runs.
using LayerState = std::variant<std::monostate, LayerCache, DeltaArrays>;

/// A router that replaces the one of a layer.
struct Router {
  const float *weight, *bias;  // [experts, hidden]; [experts], or null for none
};

/// Computes out = x + what the mixer makes of x, [hidden], and updates the layer's state, which must be of its kind. In
/// a parallel layer, that includes what the dense MLP or the shared expert makes of x. `out` may be `x`.
void mix_token(const Kernels& isa, const LayerWeights& layer, Activation activation, const float* x,
               const Position& position, const LayerState& state, float* out);

/// Computes h [hidden], what the experts read for a residual stream x, and chooses the experts. Writes experts and
/// routing weights, [top_k] each, highest weight first. If the weight multiplies the input, h includes it, and 1 is
/// written instead. The layer must have experts.
void route_token(const Kernels& isa, const LayerWeights& layer, const float* x, float* h, int64_t* experts,
                 float* weights);

/// Chooses experts and routing weights [top_k] as the router of a layer does, or as `other` does if that is not null.
void guess_token(const Kernels& isa, const LayerWeights& layer, const Router* other, const float* x, int64_t* experts,
                 float* weights);

/// Computes the residual stream that leaves a layer, out [hidden], with y [hidden] the weighted sum of its experts'
/// outputs and x the residual stream after its mixer. `out` may be `x`.
void finish_token(const Kernels& isa, const LayerWeights& layer, Activation activation, const float* x, const float* y,
                  float* out);

/// Computes the residual stream that leaves a layer with a dense MLP, out [hidden], from the one after its mixer. The
/// layer is not parallel. `out` may be `x`.
void feed_token(const Kernels& isa, const LayerWeights& layer, Activation activation, const float* x, float* out);

}  // namespace dymoe

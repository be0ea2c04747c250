// The operations of one layer outside its routed experts, for one decoded token of each of some sequences.
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

/// One token of each of `count` sequences, and the states of these sequences in one layer.
struct Sequences {
  int64_t count;
  const Position* positions;
  const std::vector<LayerState>* states;  // of each sequence, by layer
  int64_t layer;

  const LayerState& state(int64_t sequence) const { return states[sequence][layer]; }
};

/// Computes out = x + what the mixer makes of x, [tokens, hidden], and updates the states of the sequences, which must
/// be of its kind. In a parallel layer, that includes what the dense MLP or the shared expert makes of x. `out` may be
/// `x`. The result of a token does not depend on the other tokens; so it is with the functions below.
void mix_tokens(const Kernels& isa, const LayerWeights& layer, Activation activation, const Sequences& sequences,
                const float* x, float* out);

/// Computes h [tokens, hidden], what the experts read for residual streams x, and chooses the experts. Writes experts
/// and routing weights, [tokens, top_k] each, highest weight first. If the weight multiplies the input, h includes it,
/// and 1 is written instead. The layer must have experts.
void route_tokens(const Kernels& isa, const LayerWeights& layer, int64_t tokens, const float* x, float* h,
                  int64_t* experts, float* weights);

/// Chooses experts and routing weights [top_k] for x [hidden] as the router of a layer does, or as `other` does if that
/// is not null.
void guess_token(const Kernels& isa, const LayerWeights& layer, const Router* other, const float* x, int64_t* experts,
                 float* weights);

/// Computes the residual streams that leave a layer, out [tokens, hidden], with y [tokens, hidden] the weighted sums of
/// its experts' outputs and x the residual streams after its mixer. `out` may be `x`.
void finish_tokens(const Kernels& isa, const LayerWeights& layer, Activation activation, int64_t tokens, const float* x,
                   const float* y, float* out);

/// Computes the residual streams that leave a layer with a dense MLP, out [tokens, hidden], from those after its mixer.
/// The layer is not parallel. `out` may be `x`.
void feed_tokens(const Kernels& isa, const LayerWeights& layer, Activation activation, int64_t tokens, const float* x,
                 float* out);

}  // namespace dymoe

// The layers of a model for one decoded token of each of some sequences, which run as long as their experts are
// resident.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "decode/layer.h"
#include "decode/resident_table.h"

namespace dymoe {

/// The experts that a token used in a layer, and their tiers.
struct LayerUse {
  int64_t layer;
  std::vector<int64_t> experts;
  std::vector<int> tiers;  // 0 means skipped
};

/// The caller's buffers for the results of some tokens.
struct TokenBuffers {
  float *residual, *h;  // [tokens, hidden] each: the residual streams, and what the experts read
  int64_t* experts;     // [tokens, top_k], the experts that the router chose
  float* weights;       // [tokens, top_k], their routing weights
};

/// Where tokens stopped.
struct Reached {
  int64_t layer;               // the number of layers if all have run
  bool attended;               // whether the mixer of that layer has run; `residual` includes it then
  int64_t chosen;              // experts that the router of that layer chose for each token; 0 if it has not run
  std::vector<LayerUse> used;  // of each token in the layers before; the caller has yet to record these uses
};

/// The layers of a model. A layer may be missing (nullopt); the caller runs it.
class DecodeStack {
 public:
  /// Throws std::invalid_argument if the layers do not fit each other, or if all are missing.
  DecodeStack(const Kernels& isa, std::vector<std::optional<LayerWeights>> layers, Activation activation);

  /// Sets the states of the sequences to decode: of each, one state for each layer. Throws std::invalid_argument if
  /// they do not fit the layers.
  void set_states(std::vector<std::vector<LayerState>> sequences);

  /// Runs one token of each sequence from layer `first` on, whose input is x [tokens, hidden]. If `more` is not null,
  /// it is the output of the experts of layer `first` - 1 for the residual streams x: that layer is finished first, and
  /// `first` may be the number of layers. Stops before a missing layer. Stops after mixer and router of a layer whose
  /// experts are not all in `table`; without `table` that is the first layer that has experts. The result of a token
  /// does not depend on the other tokens, unless these need an expert that is not in `table`: then it stops earlier.
  Reached run(const ResidentTable* table, int64_t first, const float* x, const float* more,
              const std::vector<Position>& positions, const TokenBuffers& buffers) const;

  /// Chooses the experts of `layer` for x [hidden], by `other` if that is not null, else by the layer's own router.
  /// Writes experts and weights [top_k], as `guess_token` does.
  void route(int64_t layer, const Router* other, const float* x, int64_t* experts, float* weights) const;

 private:
  const Kernels& isa_;
  const Activation activation_;
  const std::vector<std::optional<LayerWeights>> layers_;
  std::vector<std::vector<LayerState>> sequences_;
  int64_t hidden_ = 0, rotations_ = 0;  // width of the residual stream; rotary embeddings that a Position must have

  /// Throws std::invalid_argument if tokens cannot run from layer `first` on.
  void check_run(const ResidentTable* table, int64_t first, bool finishes,
                 const std::vector<Position>& positions) const;

  /// Returns whether `layer` is known and has experts.
  bool is_moe(int64_t layer) const;
};

}  // namespace dymoe

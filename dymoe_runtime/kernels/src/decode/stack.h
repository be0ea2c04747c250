// The layers of a model for one decoded token, which run as long as their experts are resident.
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

/// The caller's buffers for the results of a token.
struct TokenBuffers {
  float *residual, *h;  // [hidden] each: the residual stream, and its norm for the experts
  int64_t* experts;     // [top_k], the experts that the router chose
  float* weights;       // [top_k], their routing weights
};

/// Where a token stopped.
struct Reached {
  int64_t layer;               // the number of layers if all have run
  bool attended;               // whether the attention of that layer has run; `residual` includes it then
  int64_t chosen;              // experts that the router of that layer chose; 0 if it has not run
  std::vector<LayerUse> used;  // of the layers before; the caller has yet to record these uses
};

/// The layers of a model. A layer may be missing (nullopt); the caller runs it.
class DecodeStack {
 public:
  /// Throws std::invalid_argument if the layers do not fit each other, or if all are missing.
  DecodeStack(const Kernels& isa, std::vector<std::optional<LayerWeights>> layers, Activation activation);

  /// Sets the KV caches of the sequence to decode, one for each layer.
  void set_caches(std::vector<LayerCache> caches);

  /// Runs a token from layer `first` on; its input is x + more, or x if `more` is null. Stops before a missing layer.
  /// Stops after attention and router of a layer whose experts are not all in `table`; without `table` that is layer
  /// `first`. Stops after the attention of a layer without a router.
  Reached run(const ResidentTable* table, int64_t first, const float* x, const float* more, const Position& position,
              const TokenBuffers& buffers) const;

  /// Chooses the experts of `layer` for x [hidden], by `other` if that is not null, else by the layer's own router.
  /// Writes h [hidden], experts and weights [top_k], as `route_token` does.
  void route(int64_t layer, const Router* other, const float* x, float* h, int64_t* experts, float* weights) const;

 private:
  const Kernels& isa_;
  const Activation activation_;
  const std::vector<std::optional<LayerWeights>> layers_;
  std::vector<LayerCache> caches_;

  int64_t hidden() const;
};

}  // namespace dymoe

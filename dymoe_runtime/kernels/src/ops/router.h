// Routing: the choice of experts by a token's logits.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dymoe {

/// Chooses the `top_k` highest of `count` logits. Writes the experts and their routing weights [top_k], highest weight
/// first. The weights are shares of the softmax; with `normalize` they are divided by their sum. The logits are
/// overwritten. If the softmax is not finite, the first experts are chosen with NaN weights.
void select_experts(const Kernels& isa, float* logits, int64_t count, int64_t top_k, bool normalize, int64_t* experts,
                    float* weights);

}  // namespace dymoe

// Products of quantized tokens, with biases.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "kernels.h"

namespace dymoe {

/// A quantized matrix with a bias.
struct Linear {
  MatrixView weight;
  const float* bias;  // [rows], or null for none
};

/// Multiplies quantized tokens by each of the `count` matrices, which have as many columns, and adds the biases. y
/// holds the results of a token one after another, then those of the next token.
void multiply(const Kernels& isa, const Activations& tokens, const Linear* const* weights, int64_t count, float* y);

/// Multiplies quantized tokens by each of `weights`.
inline void multiply(const Kernels& isa, const Activations& tokens, std::initializer_list<const Linear*> weights,
                     float* y) {
  multiply(isa, tokens, weights.begin(), int64_t(weights.size()), y);
}

}  // namespace dymoe

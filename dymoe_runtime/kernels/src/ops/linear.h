// Products of one quantized token, with biases.
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

/// Multiplies one quantized token by each of the `count` matrices, which have as many columns, and adds the biases. y
/// holds the results one after another.
void multiply(const Kernels& isa, const Activations& token, const Linear* const* weights, int64_t count, float* y);

/// Multiplies one quantized token by each of `weights`.
inline void multiply(const Kernels& isa, const Activations& token, std::initializer_list<const Linear*> weights,
                     float* y) {
  multiply(isa, token, weights.begin(), int64_t(weights.size()), y);
}

}  // namespace dymoe

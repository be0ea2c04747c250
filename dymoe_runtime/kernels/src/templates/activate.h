// The activations of gated MLPs. Except for gelu they call no library function, so that compilers vectorize the loops.
// Results do not depend on the instruction set.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace dymoe {
namespace {

/// Returns exp(x) to within 2 ulp (Cephes' expf). x is clamped to [-86, 86]; NaN stays NaN.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the low bits of (v + kRound) hold round(v)
  constexpr int32_t kRoundBits = 0x4b400000;
  const float low = x < -86.0f ? -86.0f : x;
  const float within = low > 86.0f ? 86.0f : low;
  const float shifted = within * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  int32_t power, bits;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&bits, &y, sizeof bits);
  bits = int32_t(uint32_t(bits) + (uint32_t(power - kRoundBits) << 23));
  std::memcpy(&y, &bits, sizeof bits);
  return y;
}

/// Returns v * sigmoid(v).
inline float silu(float v) { return v / (1.0f + exponential(-v)); }

/// Returns v times the cumulative normal distribution at v.
inline float gelu(float v) { return 0.5f * v * (1.0f + std::erf(v * 0.70710678f)); }

/// Returns 0.5 v (1 + tanh u) = v / (1 + exp(-2 u)), with u = sqrt(2 / pi) (v + 0.044715 v^3).
inline float gelu_tanh(float v) { return v / (1.0f + exponential(-2.0f * 0.79788456f * (v + 0.044715f * v * v * v))); }

/// Computes hidden[i] = function(hidden[i]) * ups[i] for i in [0, count).
template <class Function>
void activate_with(Function function, int64_t count, const float* __restrict ups, float* __restrict hidden) {
  for (int64_t i = 0; i < count; ++i) hidden[i] = function(hidden[i]) * ups[i];
}

/// See Kernels::activate.
void activate(Activation activation, int64_t count, const float* ups, float* hidden) {
  switch (activation) {
    case Activation::silu:
      return activate_with([](float v) { return silu(v); }, count, ups, hidden);
    case Activation::gelu:
      return activate_with([](float v) { return gelu(v); }, count, ups, hidden);
    default:
      return activate_with([](float v) { return gelu_tanh(v); }, count, ups, hidden);
  }
}

}  // namespace
}  // namespace dymoe

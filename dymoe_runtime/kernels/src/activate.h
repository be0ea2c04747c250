// The activation of a gated MLP, without library calls, so that compilers make vectors of its loop.
// Every instruction set rounds alike.
//
// Everything is in an unnamed namespace, as in product.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace dymoe {
namespace {

/// exp(x) to within 2 ulp (Cephes' expf); x beyond +-86 counts as that, NaN stays NaN.
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

inline float silu(float v) { return v / (1.0f + exponential(-v)); }

inline float gelu(float v) { return 0.5f * v * (1.0f + std::erf(v * 0.70710678f)); }

/// 0.5 v (1 + tanh u) = v / (1 + exp(-2 u)).
inline float gelu_tanh(float v) {
  return v / (1.0f + exponential(-2.0f * 0.79788456f * (v + 0.044715f * v * v * v)));
}

template <class Function>
void activate_with(Function function, int64_t count, const float* __restrict ups, float* __restrict hidden) {
  for (int64_t i = 0; i < count; ++i) hidden[i] = function(hidden[i]) * ups[i];
}

void activate(Activation activation, int64_t count, const float* ups, float* hidden) {
  switch (activation) {
    case Activation::silu: return activate_with([](float v) { return silu(v); }, count, ups, hidden);
    case Activation::gelu: return activate_with([](float v) { return gelu(v); }, count, ups, hidden);
    default: return activate_with([](float v) { return gelu_tanh(v); }, count, ups, hidden);
  }
}

}  // namespace
}  // namespace dymoe

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

/// Returns a if the condition holds, else b, by their bits: GCC makes jumps of the operator ?: where two follow each
/// other, and does not vectorize their loops.
inline float choose(bool condition, float a, float b) {
  uint32_t first, second;
  std::memcpy(&first, &a, sizeof first);
  std::memcpy(&second, &b, sizeof second);
  const uint32_t mask = -uint32_t(condition);
  first = (first & mask) | (second & ~mask);
  std::memcpy(&a, &first, sizeof a);
  return a;
}

/// Returns exp(x) to within 2 ulp (Cephes' expf). x is clamped to [-86, 86]; NaN stays NaN.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the low bits of (v + kRound) hold round(v)
  constexpr int32_t kRoundBits = 0x4b400000;
  const float low = choose(x < -86.0f, -86.0f, x);
  const float within = choose(low > 86.0f, 86.0f, low);
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

/// Returns g * sigmoid(alpha * g) * (u + 1), where g is the gate, at most `limit`, and u is up, from -limit to limit.
inline float clamped_swiglu(float gate, float up, float alpha, float limit) {
  const float g = gate > limit ? limit : gate;
  const float low = choose(up < -limit, -limit, up);
  const float u = choose(low > limit, limit, low);
  return g / (1.0f + exponential(-alpha * g)) * (u + 1.0f);
}

/// Computes hidden[i] = function(hidden[i]) * ups[i] for i in [0, count).
template <class Function>
void activate_with(Function function, int64_t count, const float* __restrict ups, float* __restrict hidden) {
  for (int64_t i = 0; i < count; ++i) hidden[i] = function(hidden[i]) * ups[i];
}

/// Computes hidden[i] = clamped_swiglu(hidden[i], ups[i], alpha, limit) for i in [0, count).
void activate_clamped(float alpha, float limit, int64_t count, const float* __restrict ups, float* __restrict hidden) {
  for (int64_t i = 0; i < count; ++i) hidden[i] = clamped_swiglu(hidden[i], ups[i], alpha, limit);
}

/// See Kernels::activate.
void activate(Activation activation, int64_t count, const float* ups, float* hidden) {
  switch (activation.kind) {
    case ActivationKind::silu:
      return activate_with([](float v) { return silu(v); }, count, ups, hidden);
    case ActivationKind::gelu:
      return activate_with([](float v) { return gelu(v); }, count, ups, hidden);
    case ActivationKind::gelu_tanh:
      return activate_with([](float v) { return gelu_tanh(v); }, count, ups, hidden);
    default:
      return activate_clamped(activation.alpha, activation.limit, count, ups, hidden);
  }
}

}  // namespace
}  // namespace dymoe

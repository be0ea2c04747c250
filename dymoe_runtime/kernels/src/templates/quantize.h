// Quantization of activations to int8, by blocks.
//
// Everything is in an unnamed namespace. product.h says why, and what a policy V has.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "templates/sources.h"

namespace dymoe {
namespace {

/// Returns the bits of the largest magnitude of kBlock floats. Bits are ordered like magnitudes, with NaN at the top.
uint32_t peak_bits(const float* x) {
  uint32_t bits[kBlock], peak = 0;
  std::memcpy(bits, x, sizeof bits);
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffffffu;
    peak = magnitude > peak ? magnitude : peak;
  }
  return peak;
}

/// Computes codes = x * inverse, rounded to the nearest, ties to even, and returns their sum.
int32_t round_block(const float* __restrict x, float inverse, int8_t* __restrict codes) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the low bits of (v + kRound) hold round(v)
  constexpr int32_t kRoundBits = 0x4b400000;
  float shifted[kBlock];
  int32_t bits[kBlock], sum = 0;
  for (int i = 0; i < kBlock; ++i) shifted[i] = x[i] * inverse + kRound;
  std::memcpy(bits, shifted, sizeof bits);  // cppcheck-suppress uninitvar
  for (int i = 0; i < kBlock; ++i) {
    codes[i] = int8_t(bits[i] - kRoundBits);
    sum += bits[i] - kRoundBits;
  }
  return sum;
}

/// Quantizes a block: x = scale * codes. `sum` is that of the codes. If x is not finite, the scale is NaN.
void quantize_block(const float* x, int8_t* codes, float* scale, float* sum) {
  const uint32_t bits = peak_bits(x);
  float peak;
  std::memcpy(&peak, &bits, sizeof peak);
  const float inverse = 127.0f / peak;
  const bool finite = bits < 0x7f800000u;
  // A peak whose inverse overflows is below 1e-36 and counts as 0.
  if (!finite || !(inverse <= FLT_MAX)) {
    std::memset(codes, 0, kBlock);
    *scale = finite ? 0.0f : NAN;
    *sum = 0.0f;
    return;
  }
  *scale = peak / 127.0f;
  *sum = float(round_block(x, inverse, codes));
}

/// See Kernels::quantize.
template <class V>
void quantize(const float* x, int64_t cols, int64_t token, const Activations& out) {
  int8_t* codes = out.codes + token * codes_pitch(out.blocks);
  float* scales = out.scales + token * out.pitch;
  float* sums = out.sums + token * out.pitch;
  for (int64_t block = 0; block < out.blocks; ++block) {
    const float* from = x + block * kBlock;
    float padded[kBlock] = {};
    const int64_t count = smaller(kBlock, cols - block * kBlock);
    if (count < kBlock) from = static_cast<const float*>(std::memcpy(padded, from, count * sizeof(float)));
    int8_t quantized[kBlock];
    quantize_block(from, quantized, scales + block, sums + block);
    sums[block] *= scales[block];
    for (int64_t i = 0; i < kBlock; i += 16) std::memcpy(codes + place(V::at_once, block, i), quantized + i, 16);
  }
  for (int64_t block = out.blocks; block < out.pitch; ++block) scales[block] = sums[block] = 0.0f;
}

}  // namespace
}  // namespace dymoe

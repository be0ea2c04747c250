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

constexpr int kHalf = kBlock / 2;
constexpr int32_t kHigh = 1 << 16;

/// Computes codes = x * inverse, rounded to the nearest, ties to even. Returns the sum of the first half of the codes,
/// plus kHigh times that of the second half.
int32_t round_block(const float* __restrict x, float inverse, int8_t* __restrict codes) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the low bits of (v + kRound) hold round(v)
  constexpr int32_t kRoundBits = 0x4b400000;
  float shifted[kBlock];
  int32_t bits[kBlock], sums = 0;
  for (int i = 0; i < kBlock; ++i) shifted[i] = x[i] * inverse + kRound;
  std::memcpy(bits, shifted, sizeof bits);  // cppcheck-suppress uninitvar
  for (int i = 0; i < kBlock; ++i) codes[i] = int8_t(bits[i] - kRoundBits);
  for (int i = 0; i < kHalf; ++i) sums += (bits[i] - kRoundBits) + (bits[i + kHalf] - kRoundBits) * kHigh;
  return sums;
}

/// Quantizes a block: x = scale * codes. Returns the sums of `round_block`. If x is not finite, the scale is NaN.
int32_t quantize_block(const float* x, int8_t* codes, float* scale) {
  const uint32_t bits = peak_bits(x);
  float peak;
  std::memcpy(&peak, &bits, sizeof peak);
  const float inverse = 127.0f / peak;
  const bool finite = bits < 0x7f800000u;
  // A peak whose inverse overflows is below 1e-36 and counts as 0.
  if (!finite || !(inverse <= FLT_MAX)) {
    std::memset(codes, 0, kBlock);
    *scale = finite ? 0.0f : NAN;
    return 0;
  }
  *scale = peak / 127.0f;
  return round_block(x, inverse, codes);
}

/// Computes the sums of kGroup blocks by their scales and by what `quantize_block` has returned.
void scale_sums(const float* __restrict scales, const int32_t (&packed)[kGroup], float* __restrict sums,
                float* __restrict half_sums) {
  for (int i = 0; i < kGroup; ++i) {
    const int32_t first = int16_t(packed[i]), second = (packed[i] - first) / kHigh;
    sums[i] = float(first + second) * scales[i];
    half_sums[2 * i] = float(first) * scales[i];
    half_sums[2 * i + 1] = float(second) * scales[i];
  }
}

/// Writes the codes of a block of a token beside those of other tokens.
void transpose_block(const int8_t* codes, int64_t block, int64_t token, const Activations& out) {
  int8_t* to = out.transposed_codes + block * kBlock * out.transposed_pitch + 4 * token;
  for (int64_t i = 0; i < kBlock; i += 4, to += 4 * out.transposed_pitch) std::memcpy(to, codes + i, 4);
}

/// See Kernels::quantize.
template <class V>
void quantize(const float* x, int64_t cols, int64_t token, const Activations& out) {
  int8_t* codes = out.codes + token * codes_pitch(out.blocks);
  for (int64_t group = 0; group < out.pitch; group += kGroup) {
    int32_t packed[kGroup] = {};
    float scales[kGroup] = {};
    for (int64_t block = group; block < smaller(group + kGroup, out.blocks); ++block) {
      const float* from = x + block * kBlock;
      float padded[kBlock] = {};
      const int64_t count = smaller(kBlock, cols - block * kBlock);
      if (count < kBlock) from = static_cast<const float*>(std::memcpy(padded, from, count * sizeof(float)));
      int8_t quantized[kBlock];
      packed[block - group] = quantize_block(from, quantized, scales + block - group);
      for (int64_t i = 0; i < kBlock; i += 16) std::memcpy(codes + place(V::at_once, block, i), quantized + i, 16);
      if constexpr (transposing<V>) {
        if (out.transposed_codes) transpose_block(quantized, block, token, out);
      }
    }
    const int64_t at = token * out.pitch + group;
    for (int64_t i = 0; i < kCopies * kGroup; ++i) out.scales[kCopies * at + i] = scales[i / kCopies];
    scale_sums(scales, packed, out.sums + at, out.half_sums + 2 * at);
    if constexpr (transposing<V>) {
      for (int64_t i = 0; out.transposed_codes && i < smaller(kGroup, out.blocks - group); ++i) {
        const int64_t to = (group + i) * out.transposed_pitch + token;
        out.transposed_scales[to] = scales[i], out.transposed_sums[to] = out.sums[at + i];
      }
    }
    if constexpr (V::folds) {
      for (int64_t i = 0; i < kGroup; ++i) {
        const int64_t block = i / V::lanes * V::lanes + folded_block<V>(i % V::lanes);
        out.folded_scales[at + i] = scales[block], out.folded_sums[at + i] = out.sums[at + block];
      }
    }
  }
  if constexpr (V::folds) {
    if (out.folded_codes)
      V::fold_row(reinterpret_cast<const uint8_t*>(codes), out.blocks,
                  reinterpret_cast<uint8_t*>(out.folded_codes + token * codes_pitch(out.blocks)));
  }
}

}  // namespace
}  // namespace dymoe

// Conversion of IEEE half precision, for processors without instructions for it.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cstdint>
#include <cstring>

namespace dymoe {
namespace {

/// Returns a half as float, exactly.
inline float half_to_float(uint16_t half) {
  uint32_t bits = uint32_t(half & 0x7fff) << 13;
  float value;
  if (bits >= 0x0f800000) bits |= 0x7f800000;  // infinite or NaN
  std::memcpy(&value, &bits, sizeof value);
  if (bits < 0x0f800000) value *= 5.192296858534828e33f;  // 2^112: the exponents' biases differ
  return half & 0x8000 ? -value : value;
}

constexpr float kMaxHalf = 65504.0f;

/// Returns the nearest half, ties to even. A value out of range becomes the largest half; NaN stays NaN.
inline uint16_t float_to_half(float value) {
  const float within = value > kMaxHalf ? kMaxHalf : value < -kMaxHalf ? -kMaxHalf : value;
  uint32_t bits;
  std::memcpy(&bits, &within, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits < 0x38800000) {  // below the least normal half: adding 0.5 rounds to the last bit of a half
    float small;
    std::memcpy(&small, &bits, sizeof small);
    small += 0.5f;
    std::memcpy(&bits, &small, sizeof bits);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  return uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

}  // namespace
}  // namespace dymoe

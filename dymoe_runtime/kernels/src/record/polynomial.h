// Arithmetic of polynomials over GF(2), modulo that of CRC-32. The highest bit of a word is the coefficient of x^0.
#pragma once

#include <cstdint>

namespace dymoe {

constexpr uint32_t kPolynomial = 0xEDB88320u;  // without x^32
constexpr uint32_t kOne = 1u << 31;

constexpr uint32_t times_x(uint32_t a) { return (a >> 1) ^ (a & 1 ? kPolynomial : 0); }

constexpr uint32_t times(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = kOne; bit; bit >>= 1, b = times_x(b))
    if (a & bit) product ^= b;
  return product;
}

/// Returns x^n.
constexpr uint32_t power_of_x(int64_t n) {
  uint32_t power = kOne, square = times_x(kOne);
  for (; n; n >>= 1, square = times(square, square))
    if (n & 1) power = times(power, square);
  return power;
}

}  // namespace dymoe

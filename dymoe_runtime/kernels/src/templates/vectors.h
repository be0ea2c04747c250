// Loops over floats: norms, routers and softmax. Sums have sixteen lanes on every instruction set, and products are not
// fused with additions, so results do not depend on the instruction set.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"
#include "templates/activate.h"
#include "templates/lanes.h"

namespace dymoe {
namespace {

constexpr int kSumLanes = 16, kParts = kSumLanes / kLanes;  // lanes of a sum; vectors that hold them

/// Returns kLanes floats from memory that need not be aligned.
Floats load_lanes(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

/// Writes kLanes floats to memory that need not be aligned.
void store_lanes(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

/// Returns a * b + c, rounded once where the processor has such an instruction.
Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__aarch64__)
  return Floats(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}

/// Returns the sum of `Width` floats: adds the upper half to the lower until one float is left.
template <int Width, class Vector>
float fold_vector(const Vector& v) {
  if constexpr (Width == 1) {
    return v;
  } else if constexpr (Width == 2) {
    return v[0] + v[1];
  } else {
    typedef float Half __attribute__((vector_size(2 * Width)));
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return fold_vector<Width / 2>(Half(low + high));
  }
}

/// Returns the sum of kSumLanes lanes, added in an order that does not depend on kLanes.
float fold(const Floats* parts) {
  Floats sums[kParts];
  std::memcpy(sums, parts, sizeof sums);
  for (int width = kParts / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return fold_vector<kLanes>(sums[0]);
}

/// Returns a . b, n floats each.
float dot_floats(const float* a, const float* b, int64_t n) {
  Floats sums[kParts] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int p = 0; p < kParts; ++p) sums[p] += load_lanes(a + i + p * kLanes) * load_lanes(b + i + p * kLanes);
  float total = fold(sums);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

/// Computes out[r] = x . rows[r] for kCacheRows rows of n floats, rounded as by `dot_floats`. The sums of four rows
/// are independent, so that additions do not wait for one another.
void dots_of_rows(const float* x, const float* rows, int64_t n, float* out) {
  Floats sums[kCacheRows][kParts] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int p = 0; p < kParts; ++p) {
      const Floats of_x = load_lanes(x + i + p * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kCacheRows; ++r) sums[r][p] += of_x * load_lanes(rows + r * n + i + p * kLanes);
    }
  for (int r = 0; r < kCacheRows; ++r) {
    float total = fold(sums[r]);
    for (int64_t j = i; j < n; ++j) total += x[j] * rows[r * n + j];
    out[r] = total;
  }
}

/// See Kernels::norm.
void norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  const float inverse = 1.0f / std::sqrt(dot_floats(x, x, n) / float(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * inverse);
}

/// See Kernels::layer_norm.
void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* out) {
  float sums[kSumLanes] = {};
  for (int64_t i = 0; i < n; ++i) sums[i % kSumLanes] += x[i];
  float mean = 0.0f;
  for (float sum : sums) mean += sum;
  mean /= float(n);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] - mean;
  norm(out, weight, n, eps, out);
  if (bias)
    for (int64_t i = 0; i < n; ++i) out[i] += bias[i];
}

/// See Kernels::dots.
void dots(const float* rows, int64_t n, int64_t begin, int64_t end, const float* x, float* out) {
  int64_t r = begin;
  for (; r + kCacheRows <= end; r += kCacheRows) dots_of_rows(x, rows + r * n, n, out + r);
  for (; r < end; ++r) out[r] = dot_floats(rows + r * n, x, n);
}

/// See Kernels::exponentials. The sum is NaN if any x is.
float exponentials(float* x, int64_t n) {
  float most = x[0];
  for (int64_t i = 1; i < n; ++i) most = x[i] > most ? x[i] : most;
  for (int64_t i = 0; i < n; ++i) x[i] = exponential(x[i] - most);
  float sums[kSumLanes] = {};
  for (int64_t i = 0; i < n; ++i) sums[i % kSumLanes] += x[i];
  float total = 0.0f;
  for (float sum : sums) total += sum;
  return total;
}

}  // namespace
}  // namespace dymoe

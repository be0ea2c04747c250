// Sums of the lanes of vectors of eight floats.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <immintrin.h>

#include "templates/product.h"

namespace dymoe {
namespace {

/// Returns the sum of the two halves of a vector.
inline __m128 add_halves(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

/// Computes the sum of each vector as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), whatever the number of vectors.
template <int Rows>
DYMOE_INLINE void sum_eight(const __m256 (&v)[Rows], float (&out)[Rows]) {
  int r = 0;
  DYMOE_UNROLL for (; r + 4 <= Rows; r += 4) {
    const __m256 first = _mm256_hadd_ps(v[r], v[r + 1]), second = _mm256_hadd_ps(v[r + 2], v[r + 3]);
    _mm_storeu_ps(out + r, add_halves(_mm256_hadd_ps(first, second)));
  }
  DYMOE_UNROLL for (; r < Rows; ++r) {
    const __m256 pairs = _mm256_hadd_ps(v[r], v[r]);
    out[r] = _mm_cvtss_f32(add_halves(_mm256_hadd_ps(pairs, pairs)));
  }
}

}  // namespace
}  // namespace dymoe

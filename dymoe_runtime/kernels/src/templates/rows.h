// Packing and unpacking of the KV cache's rows, which kv_cache.py defines.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "templates/half.h"
#include "templates/vectors.h"

namespace dymoe {
namespace {

/// Returns kLanes halves as floats.
Floats load_halves(const uint8_t* p) {
#if defined(__AVX512F__)
  return Floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return Floats(vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))));
#else
  uint16_t halves[kLanes];
  std::memcpy(halves, p, sizeof halves);
  Floats values;
  for (int i = 0; i < kLanes; ++i) values[i] = half_to_float(halves[i]);
  return values;
#endif
}

/// Returns a half as float.
inline float load_half(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof half);
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  return half_to_float(half);
#endif
}

/// Returns kLanes signed bytes as floats. Intrinsics, because compilers turn a plain loop into one move for each byte.
Floats load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
  return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__aarch64__)
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  const int16x8_t pairs = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(word)));
  return Floats(vcvtq_f32_s32(vmovl_s16(vget_low_s16(pairs))));
#else
  Floats values;
  for (int i = 0; i < kLanes; ++i) values[i] = float(int8_t(p[i]));
  return values;
#endif
}

/// Writes kLanes floats as halves; values out of range become the largest half.
void store_halves(uint8_t* p, Floats v) {
  v = v > kMaxHalf ? Floats{} + kMaxHalf : v < -kMaxHalf ? Floats{} - kMaxHalf : v;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u8(p, vreinterpret_u8_f16(vcvt_f16_f32(float32x4_t(v))));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint16_t half = float_to_half(v[i]);
    std::memcpy(p + 2 * i, &half, sizeof half);
  }
#endif
}

/// Writes a float as half, as `float_to_half` rounds it.
inline void store_half(uint8_t* p, float value) {
  const uint16_t half = float_to_half(value);
  std::memcpy(p, &half, sizeof half);
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer

/// Packs at most kCacheGroup floats into int8 codes and a scale, which is a half; NaN if a float is not finite.
inline void pack_group(const float* x, int64_t count, int8_t* codes, uint8_t* scale) {
  float most = 0.0f, invalid = 0.0f;  // invalid: NaN if a float is not finite
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(x[i]);
    most = size > most ? size : most;
    invalid += x[i] * 0.0f;
  }
  store_half(scale, most / 127.0f + invalid);
  const float step = load_half(scale);
  if (!(step > 0.0f)) {
    std::memset(codes, 0, count);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float ratio = x[i] / step;
    const float within = ratio > 127.0f ? 127.0f : ratio < -127.0f ? -127.0f : ratio;
    codes[i] = int8_t((within + kRound) - kRound);
  }
}

/// Packs x [n] into a row of the cache.
void pack_row(const float* x, int64_t n, int bits, uint8_t* row) {
  int64_t i = 0;
  if (bits == 32) {
    std::memcpy(row, x, n * sizeof(float));
  } else if (bits == 16) {
    for (; i + kLanes <= n; i += kLanes) store_halves(row + 2 * i, load_lanes(x + i));
    for (; i < n; ++i) store_half(row + 2 * i, x[i]);
  } else {
    for (uint8_t* scale = row + n; i < n; i += kCacheGroup, scale += 2)
      pack_group(x + i, kCacheGroup < n - i ? kCacheGroup : n - i, reinterpret_cast<int8_t*>(row + i), scale);
  }
}

/// Unpacks a row of the cache into out [n].
void unpack_row(const uint8_t* row, int bits, int64_t n, float* out) {
  int64_t i = 0;
  if (bits == 32) {
    std::memcpy(out, row, n * sizeof(float));
  } else if (bits == 16) {
    for (; i + kLanes <= n; i += kLanes) store_lanes(out + i, load_halves(row + 2 * i));
    for (; i < n; ++i) out[i] = load_half(row + 2 * i);
  } else {
    const uint8_t* scales = row + n;
    for (; i + kCacheGroup <= n; i += kCacheGroup, scales += 2) {
      const Floats scale = load_half(scales) - Floats{};
      for (int64_t j = i; j < i + kCacheGroup; j += kLanes) store_lanes(out + j, scale * load_bytes(row + j));
    }
    for (const float scale = i < n ? load_half(scales) : 0.0f; i < n; ++i) out[i] = scale * float(int8_t(row[i]));
  }
}

}  // namespace
}  // namespace dymoe

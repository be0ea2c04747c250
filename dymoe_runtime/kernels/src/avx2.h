// The policy of AVX2 and FMA; see product.h.
//
// Everything is in an unnamed namespace, as there.
#pragma once

#include <immintrin.h>

#include "product.h"

namespace dymoe {
namespace {

struct Avx2 {
  struct Codes {
    __m256i low, high;  // columns 0..31 and 32..63
  };
  using Lanes = __m256;

  static constexpr int lanes = 8;
  static constexpr int direct_rows = 4, tile_rows = 2, tile_tokens = 2;
  template <bool Wide>
  static constexpr float offset = Wide ? 128.0f : 0.0f;

  static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  /// -1 in the columns whose bit is set.
  static __m256i spread_bits(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), byte_of);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of);
  }

  template <int W>
  static Codes load(const uint8_t* p) {
    if constexpr (W == 8) {
      return {load256(p), load256(p + 32)};
    } else if constexpr (W == 4) {
      const __m256i bytes = load256(p), mask = _mm256_set1_epi8(15);
      return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi32(bytes, 4), mask)};
    } else if constexpr (W == 2) {
      const __m256i mask = _mm256_set1_epi8(3);
      const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      const __m256i low = _mm256_srlv_epi32(bytes, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
      const __m256i high = _mm256_srlv_epi32(bytes, _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6));
      return {_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)};
    } else {
      const __m256i mask = _mm256_set1_epi8(1);
      return {_mm256_and_si256(spread_bits(p), mask), _mm256_and_si256(spread_bits(p + 4), mask)};
    }
  }

  template <int W>
  static Codes append(Codes codes, const uint8_t* p) {
    if constexpr (W == 1) {
      return {_mm256_sub_epi8(_mm256_add_epi8(codes.low, codes.low), spread_bits(p)),
              _mm256_sub_epi8(_mm256_add_epi8(codes.high, codes.high), spread_bits(p + 4))};
    } else {
      // Codes of at most 8 - W bits stay in their bytes when wider lanes are shifted.
      const Codes bits = load<W>(p);
      return {_mm256_or_si256(_mm256_slli_epi32(codes.low, W), bits.low),
              _mm256_or_si256(_mm256_slli_epi32(codes.high, W), bits.high)};
    }
  }

  using Table = __m256i;
  static Table load_table(const uint8_t* numbers) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers)));
  }
  static Codes look_up(const Codes& codes, Table table) {
    return {_mm256_shuffle_epi8(table, codes.low), _mm256_shuffle_epi8(table, codes.high)};
  }

  static void store(uint8_t* out, const Codes& codes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), codes.high);
  }

  using Tokens = Codes;
  static Tokens load_tokens(const int8_t* p) { return {load256(p), load256(p + 32)}; }
  static void keep(Codes& codes) { asm("" : "+x"(codes.low), "+x"(codes.high)); }

  static __m256i add_pairs(__m256i v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }

  /// Pairs of (code - 128) * a, as |c| * (a with the sign of c): at most 2 * 128 * 127 < 2^15.
  static __m256i signed_pairs(__m256i codes, __m256i a) {
    const __m256i centred = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(a, centred));
  }

  template <bool Wide>
  static Lanes dot(const Codes& codes, const Tokens& a) {
    if constexpr (Wide) {
      return _mm256_cvtepi32_ps(
          _mm256_add_epi32(add_pairs(signed_pairs(codes.low, a.low)), add_pairs(signed_pairs(codes.high, a.high))));
    } else {
      // Four products of 6-bit codes: at most 4 * 63 * 127 < 2^15.
      return _mm256_cvtepi32_ps(add_pairs(
          _mm256_add_epi16(_mm256_maddubs_epi16(codes.low, a.low), _mm256_maddubs_epi16(codes.high, a.high))));
    }
  }

  static Lanes zero() { return _mm256_setzero_ps(); }
  static Lanes broadcast(float value) { return _mm256_set1_ps(value); }
  static Lanes load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static Lanes load_steps(const uint8_t* group, int i) {
    int32_t bytes;
    std::memcpy(&bytes, group + i / 2, sizeof bytes);
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(bytes));
    const __m128i steps = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
    const __m256i index = _mm256_cvtepu8_epi32(steps);
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(kSteps), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(kSteps + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  static void store_floats(float* p, Lanes v) { _mm256_storeu_ps(p, v); }
  static Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Lanes v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};

}  // namespace
}  // namespace dymoe

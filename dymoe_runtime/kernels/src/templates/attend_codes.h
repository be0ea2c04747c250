// Attention of one token to keys and values of 8 bits, in whole numbers, for processors that add products of bytes and
// of 16-bit numbers to 32-bit sums. Queries and weights are rounded to 16 bits, so the result is that of floats to four
// digits. Keys are turned, so that a lane holds a key and no sum runs across lanes.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "templates/rows.h"
#include "templates/sources.h"

namespace dymoe {
namespace {

// With AVX-512, vectors of floats are wider than those of AVX-VNNI.
#if !defined(__AVX512VNNI__) && (!defined(__AVXVNNI__) || defined(__AVX512F__))
/// Returns whether `attend_codes` takes heads of n columns.
constexpr bool attends_to_codes(int64_t, int) { return false; }
inline void attend_codes(const float*, int64_t, const CacheRows&, int64_t, int64_t, const float*, float*, float*) {}
#else

#if defined(__AVX512VNNI__)
using Numbers = __m512i;  // bytes, pairs or whole numbers
DYMOE_INLINE Numbers load_numbers(const void* p) { return _mm512_loadu_si512(p); }
DYMOE_INLINE void store_numbers(void* p, Numbers v) { _mm512_storeu_si512(p, v); }
DYMOE_INLINE Numbers repeat(int32_t v) { return _mm512_set1_epi32(v); }
/// Adds 128 to signed bytes, which makes them unsigned.
DYMOE_INLINE Numbers make_unsigned(Numbers v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
/// Adds to each sum the products of four unsigned and four signed bytes.
DYMOE_INLINE Numbers add_byte_products(Numbers sums, Numbers u, Numbers s) { return _mm512_dpbusd_epi32(sums, u, s); }
/// Adds to each sum the products of two pairs of 16-bit numbers.
DYMOE_INLINE Numbers add_pair_products(Numbers sums, Numbers a, Numbers b) { return _mm512_dpwssd_epi32(sums, a, b); }
/// Returns 256 * high + low.
DYMOE_INLINE Numbers join(Numbers high, Numbers low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
DYMOE_INLINE Floats as_floats(Numbers v) { return Floats(_mm512_cvtepi32_ps(v)); }
DYMOE_INLINE Numbers rounded(Floats v) { return _mm512_cvtps_epi32(__m512(v)); }
/// Returns 2 * kLanes bytes as 16-bit numbers.
DYMOE_INLINE Numbers widened(const uint8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DYMOE_INLINE Numbers low_pairs(Numbers a, Numbers b) { return _mm512_unpacklo_epi16(a, b); }
DYMOE_INLINE Numbers high_pairs(Numbers a, Numbers b) { return _mm512_unpackhi_epi16(a, b); }
/// Writes numbers that fit 16 bits.
DYMOE_INLINE void store_narrowed(int16_t* p, Numbers v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}

/// Makes number i of vector r number r of vector i.
DYMOE_INLINE void turn(Numbers (&v)[16]) {
  Numbers t[16];
  DYMOE_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  DYMOE_UNROLL for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  constexpr int even = 0x88, odd = 0xdd;  // quarters 0 and 2 of both vectors, or 1 and 3
  DYMOE_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], even), t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], odd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], even);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], odd);
  }
  DYMOE_UNROLL for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], even), v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], odd);
  }
}
#else
using Numbers = __m256i;
DYMOE_INLINE Numbers load_numbers(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
DYMOE_INLINE void store_numbers(void* p, Numbers v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
DYMOE_INLINE Numbers repeat(int32_t v) { return _mm256_set1_epi32(v); }
DYMOE_INLINE Numbers make_unsigned(Numbers v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }
DYMOE_INLINE Numbers add_byte_products(Numbers sums, Numbers u, Numbers s) {
  return _mm256_dpbusd_avx_epi32(sums, u, s);
}
DYMOE_INLINE Numbers add_pair_products(Numbers sums, Numbers a, Numbers b) {
  return _mm256_dpwssd_avx_epi32(sums, a, b);
}
DYMOE_INLINE Numbers join(Numbers high, Numbers low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
DYMOE_INLINE Floats as_floats(Numbers v) { return Floats(_mm256_cvtepi32_ps(v)); }
DYMOE_INLINE Numbers rounded(Floats v) { return _mm256_cvtps_epi32(__m256(v)); }
DYMOE_INLINE Numbers widened(const uint8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DYMOE_INLINE Numbers low_pairs(Numbers a, Numbers b) { return _mm256_unpacklo_epi16(a, b); }
DYMOE_INLINE Numbers high_pairs(Numbers a, Numbers b) { return _mm256_unpackhi_epi16(a, b); }
DYMOE_INLINE void store_narrowed(int16_t* p, Numbers v) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}
DYMOE_INLINE void turn(Numbers (&v)[8]) {
  Numbers t[8];
  DYMOE_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  DYMOE_UNROLL for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]), v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]), v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  DYMOE_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x20), t[i + 4] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
  }
  DYMOE_UNROLL for (int i = 0; i < 8; ++i) v[i] = t[i];
}
#endif

constexpr int64_t kNumberBytes = 4 * kLanes;  // of a vector
constexpr int64_t kValueRows = 32;            // values that are added up in whole numbers
constexpr int64_t kMostColumns = 256, kMostGroups = kMostColumns / kCacheGroup;  // of a head
constexpr int64_t kMostRowBytes = kMostColumns + 2 * kMostGroups;
constexpr int64_t kMostHeads = 16;      // that share their keys, at a time
constexpr float kLeast = 1e-30f;        // what is smaller counts as 0
constexpr float kQueryMax = 32512.0f;   // 127 * 256, so that the upper byte stays one when it is rounded
constexpr float kWeightMax = 32767.0f;  // 32 rows of such weights and of bytes: less than 2^31

/// Returns whether `attend_codes` takes heads of n columns.
constexpr bool attends_to_codes(int64_t n, int bits) {
  return bits == 8 && n % kNumberBytes == 0 && n % (2 * kLanes) == 0 && n <= kMostColumns;
}

/// A query in whole numbers of 16 bits.
struct QueryCodes {
  int32_t high[kMostColumns / 4], low[kMostColumns / 4];  // upper and lower bytes of four columns, all signed
  int32_t offset[kMostGroups];                            // what unsigned keys add too much, negated
  float scale;                                            // NaN if the query is not finite
};

inline void encode_query(const float* query, int64_t n, QueryCodes& out) {
  float most = 0.0f, invalid = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    most = std::fabs(query[i]) > most ? std::fabs(query[i]) : most;
    invalid += query[i] * 0.0f;
  }
  const bool any = most > kLeast && invalid == 0.0f;
  out.scale = invalid + (any ? most / kQueryMax : 0.0f);
  int8_t bytes[2][kMostColumns] = {};
  const float factor = any ? kQueryMax / most : 0.0f;
  for (int64_t g = 0; g < n / kCacheGroup; ++g) {
    int32_t sum = 0;
    for (int64_t i = g * kCacheGroup; any && i < (g + 1) * kCacheGroup; ++i) {
      const int32_t code = int32_t((query[i] * factor + kRound) - kRound), high = (code + 128) >> 8;
      bytes[0][i] = int8_t(high), bytes[1][i] = int8_t(code - 256 * high);
      sum += code;
    }
    out.offset[g] = -128 * sum;
  }
  std::memcpy(out.high, bytes[0], n), std::memcpy(out.low, bytes[1], n);
}

/// Copies the scales of `Rows` cache rows, `pitch` bytes apart, to halves[group].
template <int64_t Rows>
DYMOE_INLINE void gather_scales(const uint8_t* rows, int64_t pitch, int64_t n, uint16_t (&halves)[kMostGroups][Rows]) {
  for (int64_t r = 0; r < Rows; ++r)
    for (int64_t g = 0; g < n / kCacheGroup; ++g) std::memcpy(&halves[g][r], rows + r * pitch + n + 2 * g, 2);
}

inline Floats halves_at(const uint16_t* p) { return load_halves(reinterpret_cast<const uint8_t*>(p)); }

/// Computes the scores of kLanes keys, whose rows are `pitch` bytes apart, for each query; scores are times `size`.
void score_keys(const uint8_t* keys, int64_t pitch, int64_t n, const QueryCodes* queries, int64_t heads, float size,
                float* scores, int64_t scores_pitch) {
  constexpr int groups = kNumberBytes / kCacheGroup;  // of a vector
  constexpr int quads = kCacheGroup / 4;              // of a group
  alignas(64) uint16_t halves[kMostGroups][kLanes];
  gather_scales(keys, pitch, n, halves);
  for (int64_t c = 0; c < n; c += kNumberBytes) {
    Numbers columns[kLanes];  // four of each key
    DYMOE_UNROLL for (int r = 0; r < kLanes; ++r) columns[r] = make_unsigned(load_numbers(keys + r * pitch + c));
    turn(columns);
    const int64_t first = c / kCacheGroup;
    Floats scales[groups];
    DYMOE_UNROLL for (int g = 0; g < groups; ++g) scales[g] = halves_at(halves[first + g]);
    for (int64_t h = 0; h < heads; ++h) {
      const QueryCodes& query = queries[h];
      const int32_t *high = query.high + c / 4, *low = query.low + c / 4;
      float* to = scores + h * scores_pitch;
      Floats sum = c ? load_lanes(to) : Floats{};
      DYMOE_UNROLL for (int g = 0; g < groups; ++g) {
        Numbers highs = repeat(0), lows = repeat(query.offset[first + g]);
        DYMOE_UNROLL for (int i = quads * g; i < quads * (g + 1); ++i) {
          highs = add_byte_products(highs, columns[i], repeat(high[i]));
          lows = add_byte_products(lows, columns[i], repeat(low[i]));
        }
        sum = multiply_add(as_floats(join(highs, lows)), scales[g], sum);
      }
      store_lanes(to, c + kNumberBytes == n ? sum * (query.scale * size) : sum);
    }
  }
}

/// Returns the greatest of `Width` floats, which are not NaN.
template <int Width, class Vector>
DYMOE_INLINE float greatest(const Vector& v) {
  if constexpr (Width == 2) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    typedef float Half __attribute__((vector_size(2 * Width)));
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return greatest<Width / 2>(Half(low > high ? low : high));
  }
}

/// Columns 8 i to 8 i + 3 and 8 i + 4 to 8 i + 7 of 2 * kLanes columns lie in the first and the second vector of pairs.
DYMOE_INLINE void order_columns(float* columns) {
  float split[2 * kLanes];
  std::memcpy(split, columns, sizeof split);
  for (int i = 0; i < 2 * kLanes; ++i) columns[i] = split[i / 4 % 2 * kLanes + i / 8 * 4 + i % 4];
}

/// Adds kValueRows values times their weights, which are not negative, to the output of each head, whose columns are
/// split as `order_columns` finds them.
void add_values(const uint8_t* values, int64_t pitch, int64_t n, const float* weights, int64_t weights_pitch,
                int64_t heads, float* out) {
  const int64_t groups = n / kCacheGroup;
  alignas(64) int32_t pairs[kValueRows / 2 * kMostColumns];  // [two rows][column]
  alignas(64) uint16_t halves[kMostGroups][kValueRows];
  float scales[kMostGroups][kValueRows], invalid[kMostGroups];  // NaN if a scale is, else 0
  gather_scales(values, pitch, n, halves);
  for (int64_t g = 0; g < groups; ++g) {
    Floats nothing = {};
    DYMOE_UNROLL for (int p = 0; p < kValueRows; p += kLanes) {
      const Floats scale = halves_at(halves[g] + p);
      store_lanes(scales[g] + p, scale);
      nothing += scale * 0.0f;
    }
    invalid[g] = fold_vector<kLanes>(nothing);
  }
  for (int64_t p = 0; p < kValueRows; p += 2)
    for (int64_t c = 0; c < n; c += 2 * kLanes) {
      const Numbers a = widened(values + p * pitch + c), b = widened(values + (p + 1) * pitch + c);
      int32_t* to = pairs + p / 2 * n + c;
      store_numbers(to, low_pairs(a, b)), store_numbers(to + kLanes, high_pairs(a, b));
    }
  for (int64_t h = 0; h < heads; ++h) {
    const float* weight = weights + h * weights_pitch;
    float shares[kMostGroups][kValueRows], unit[kMostGroups], factor[kMostGroups];
    for (int64_t g = 0; g < groups; ++g) {
      Floats most = {};
      DYMOE_UNROLL for (int p = 0; p < kValueRows; p += kLanes) {
        const Floats share = load_lanes(weight + p) * load_lanes(scales[g] + p);
        store_lanes(shares[g] + p, share);
        most = share > most ? share : most;
      }
      unit[g] = greatest<kLanes>(most) * (1.0f / kWeightMax);
    }
    for (int64_t g = 0; g < groups; ++g) factor[g] = unit[g] > kLeast ? 1.0f / unit[g] : 0.0f;
    for (int64_t g = 0; g < groups; ++g) {
      alignas(64) int16_t numbers[kValueRows];
      DYMOE_UNROLL for (int p = 0; p < kValueRows; p += kLanes)
          store_narrowed(numbers + p, rounded(load_lanes(shares[g] + p) * factor[g]));
      constexpr int vectors = kCacheGroup / kLanes;
      Numbers sums[vectors];
      DYMOE_UNROLL for (int i = 0; i < vectors; ++i) sums[i] = repeat(0);
      DYMOE_UNROLL for (int p = 0; p < kValueRows / 2; ++p) {
        int32_t two;
        std::memcpy(&two, numbers + 2 * p, sizeof two);
        DYMOE_UNROLL for (int i = 0; i < vectors; ++i) sums[i] =
            add_pair_products(sums[i], load_numbers(pairs + p * n + g * kCacheGroup + i * kLanes), repeat(two));
      }
      const Floats size = unit[g] + invalid[g] - Floats{};
      float* to = out + h * n + g * kCacheGroup;
      DYMOE_UNROLL for (int i = 0; i < vectors; ++i)
          store_lanes(to + i * kLanes, multiply_add(as_floats(sums[i]), size, load_lanes(to + i * kLanes)));
    }
  }
}

/// `attend` for at most kMostHeads heads.
void attend_codes_of_few(const float* queries, int64_t heads, const CacheRows& cache, int64_t count, int64_t n,
                         const float* sinks, float* scores, float* out) {
  const int64_t pitch = count + 1;  // of scores, with room for a sink
  const float size = 1.0f / std::sqrt(float(n));
  QueryCodes codes[kMostHeads];
  for (int64_t h = 0; h < heads; ++h) encode_query(queries + h * n, n, codes[h]);
  uint8_t rows[kValueRows * kMostRowBytes];  // the last ones, and zeros
  static_assert(kLanes <= kValueRows);
  const auto padded = [&](const uint8_t* from, int64_t p, int64_t most) {
    std::memset(rows, 0, most * cache.pitch);
    std::memcpy(rows, from + p * cache.pitch, (count - p) * cache.pitch);
    return rows;
  };
  int64_t p = 0;
  for (; p + kLanes <= count; p += kLanes)
    score_keys(cache.keys + p * cache.pitch, cache.pitch, n, codes, heads, size, scores + p, pitch);
  float last[kMostHeads * kValueRows] = {};
  if (p < count) {
    score_keys(padded(cache.keys, p, kLanes), cache.pitch, n, codes, heads, size, last, kLanes);
    for (int64_t h = 0; h < heads; ++h) std::memcpy(scores + h * pitch + p, last + h * kLanes, 4 * (count - p));
  }
  float inverse[kMostHeads];
  for (int64_t h = 0; h < heads; ++h) {
    if (sinks) scores[h * pitch + count] = sinks[h];
    inverse[h] = 1.0f / exponentials(scores + h * pitch, sinks ? count + 1 : count);
  }
  std::memset(out, 0, heads * n * sizeof(float));
  for (p = 0; p + kValueRows <= count; p += kValueRows)
    add_values(cache.values + p * cache.pitch, cache.pitch, n, scores + p, pitch, heads, out);
  if (p < count) {
    std::memset(last, 0, sizeof last);
    for (int64_t h = 0; h < heads; ++h) std::memcpy(last + h * kValueRows, scores + h * pitch + p, 4 * (count - p));
    add_values(padded(cache.values, p, kValueRows), cache.pitch, n, last, kValueRows, heads, out);
  }
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t c = 0; c < n; c += 2 * kLanes) order_columns(out + h * n + c);
    for (int64_t i = 0; i < n; ++i) out[h * n + i] *= inverse[h];  // NaN if a score is
  }
}

/// `attend` for a cache of which `attends_to_codes` is true.
inline void attend_codes(const float* queries, int64_t heads, const CacheRows& cache, int64_t count, int64_t n,
                         const float* sinks, float* scores, float* out) {
  for (int64_t h = 0; h < heads; h += kMostHeads) {
    const int64_t some = heads - h < kMostHeads ? heads - h : kMostHeads;
    attend_codes_of_few(queries + h * n, some, cache, count, n, sinks ? sinks + h : nullptr, scores + h * (count + 1),
                        out + h * n);
  }
}
#endif

}  // namespace
}  // namespace dymoe

// Attention of one KV head: rows of the cache made floats, one token, and tiles of a prompt.
//
// Everything is in an unnamed namespace, as in product.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "half.h"
#include "vectors.h"

namespace dymoe {
namespace {

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

inline float load_half(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof half);
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  return half_to_float(half);
#endif
}

/// Signed bytes; compilers make one move for each of them of what is written without names of instructions.
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

void store_halves(uint8_t* p, Floats v) {
  v = v > kMostHalf ? Floats{} + kMostHalf : v < -kMostHalf ? Floats{} - kMostHalf : v;
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

inline void store_half(uint8_t* p, float value) {
  const uint16_t half = float_to_half(value);
  std::memcpy(p, &half, sizeof half);
}

/// Codes of some floats, and their scale.
inline void pack_group(const float* x, int64_t count, int8_t* codes, uint8_t* scale) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added and taken away again is rounded
  float most = 0.0f, spoilt = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(x[i]);
    most = size > most ? size : most;
    spoilt += x[i] * 0.0f;
  }
  store_half(scale, most / 127.0f + spoilt);
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

/// One row of the cache from floats, x [n].
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

/// One row of the cache as floats, out [n].
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

/// Products of a query with kCacheRows rows, each as `dot_floats` gives it; four sums do not wait for one another.
void dots_of_rows(const float* query, const float* rows, int64_t n, float* out) {
  Floats sums[kCacheRows][kParts] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int p = 0; p < kParts; ++p) {
      const Floats q = load_lanes(query + i + p * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kCacheRows; ++r) sums[r][p] += q * load_lanes(rows + r * n + i + p * kLanes);
    }
  for (int r = 0; r < kCacheRows; ++r) {
    float total = fold(sums[r]);
    for (int64_t j = i; j < n; ++j) total += query[j] * rows[r * n + j];
    out[r] = total;
  }
}

/// out += the sum of kCacheRows rows, each times its weight.
void add_rows(const float* weights, const float* rows, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    float sum = out[i];
#pragma GCC unroll 4
    for (int r = 0; r < kCacheRows; ++r) sum += weights[r] * rows[r * n + i];
    out[i] = sum;
  }
}

/// out of queries [heads, n] over `count` rows; scores hold heads * count floats, rows kCacheRows * n.
void attend(const float* queries, int64_t heads, const CacheRows& cache, int64_t count, int64_t n, float* scores,
            float* rows, float* out) {
  const float size = 1.0f / std::sqrt(float(n));
  const auto unpack = [&](const uint8_t* from, int64_t p) {
    const int64_t there = count - p < kCacheRows ? count - p : kCacheRows;
    for (int64_t r = 0; r < there; ++r) unpack_row(from + (p + r) * cache.pitch, cache.bits, n, rows + r * n);
    return there;
  };
  for (int64_t p = 0; p < count; p += kCacheRows) {
    const int64_t there = unpack(cache.keys, p);
    for (int64_t h = 0; h < heads; ++h) {
      float* to = scores + h * count + p;
      if (there == kCacheRows) {
        dots_of_rows(queries + h * n, rows, n, to);
      } else {
        for (int64_t r = 0; r < there; ++r) to[r] = dot_floats(queries + h * n, rows + r * n, n);
      }
      for (int64_t r = 0; r < there; ++r) to[r] *= size;
    }
  }
  std::memset(out, 0, heads * n * sizeof(float));
  for (int64_t h = 0; h < heads; ++h) {
    float* weights = scores + h * count;
    const float inverse = 1.0f / exponentials(weights, count);
    for (int64_t p = 0; p < count; ++p) weights[p] *= inverse;
  }
  for (int64_t p = 0; p < count; p += kCacheRows) {
    const int64_t there = unpack(cache.values, p);
    for (int64_t h = 0; h < heads; ++h) {
      const float* weights = scores + h * count + p;
      float* to = out + h * n;
      if (there == kCacheRows) {
        add_rows(weights, rows, n, to);
      } else {
        for (int64_t r = 0; r < there; ++r)
          for (int64_t i = 0; i < n; ++i) to[i] += weights[r] * rows[r * n + i];
      }
    }
  }
}

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

// Rows of a tile lie in the lanes of two vectors, so that maxima and sums over keys need no folding.
constexpr int kTileVectors = 2, kTileRows = kTileVectors * kLanes;
static_assert(kTileRows <= kMostTileRows);
constexpr int kTileUnroll = kLanes == 8 ? 4 : 8;  // what the registers hold of sums
static_assert(kTileKeys % kTileUnroll == 0 && kTileColumns % kTileUnroll == 0);

/// c[j] += sum over i < depth of a[j * across + i * along] * b[i] for j < count; b and c have kTileRows floats each.
void multiply_tile(const float* a, int64_t across, int64_t along, const float* b, int64_t depth, int64_t count,
                   float* c) {
  for (int64_t j = 0; j < count; j += kTileUnroll) {
    float* to = c + j * kTileRows;
    Floats sums[kTileUnroll][kTileVectors];
#pragma GCC unroll 8
    for (int u = 0; u < kTileUnroll; ++u)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sums[u][v] = load_lanes(to + u * kTileRows + v * kLanes);
    const float* from = a + j * across;
    for (int64_t i = 0; i < depth; ++i) {
      Floats right[kTileVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) right[v] = load_lanes(b + i * kTileRows + v * kLanes);
#pragma GCC unroll 8
      for (int u = 0; u < kTileUnroll; ++u) {
        const Floats left = from[u * across + i * along] - Floats{};
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) sums[u][v] = multiply_add(left, right[v], sums[u][v]);
      }
    }
#pragma GCC unroll 8
    for (int u = 0; u < kTileUnroll; ++u)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) store_lanes(to + u * kTileRows + v * kLanes, sums[u][v]);
  }
}

/// A tile at work: the softmax over keys is made as they come (arXiv 2205.14135).
struct TileState {
  const PromptTile& tile;
  int64_t columns;  // tile.n, rounded up
  float *queries, *sums, *scores, *rows;  // [columns, kTileRows] twice, [kTileKeys, kTileRows], [kTileKeys, columns]
  int32_t positions[kTileRows];
  float most[kTileRows], total[kTileRows];

  TileState(const PromptTile& work, float* scratch) : tile(work), columns(tile_columns(work.n)) {
    queries = scratch;
    sums = queries + columns * kTileRows;
    scores = sums + columns * kTileRows;
    rows = scores + kTileKeys * kTileRows;
    std::memset(queries, 0, 2 * columns * kTileRows * sizeof(float));
    std::memset(rows, 0, kTileKeys * columns * sizeof(float));
    const float size = 1.0f / std::sqrt(float(tile.n));
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t row = r < tile.rows ? r : tile.rows - 1;
      const float* query = query_of(row);
      for (int64_t i = 0; i < tile.n; ++i) queries[i * kTileRows + r] = size * query[i];
      positions[r] = int32_t(tile.start + (tile.first + row) / tile.group);
      most[r] = std::numeric_limits<float>::lowest(), total[r] = 0.0f;
    }
  }

  int64_t offset_of(int64_t row) const {
    return (tile.first + row) / tile.group * tile.pitch + (tile.first + row) % tile.group * tile.n;
  }
  const float* query_of(int64_t row) const { return tile.queries + offset_of(row); }
  int64_t past_last_key() const { return positions[kTileRows - 1] + 1; }
  int64_t first_key() const {
    const int64_t seen = tile.window ? positions[0] + 1 - tile.window : 0;
    return seen > 0 ? seen / kTileKeys * kTileKeys : 0;
  }

  void unpack(const uint8_t* from, int64_t key) {
    const int64_t count = past_last_key() - key < kTileKeys ? past_last_key() - key : kTileKeys;
    for (int64_t k = 0; k < count; ++k)
      unpack_row(from + (key + k) * tile.cache.pitch, tile.cache.bits, tile.n, rows + k * columns);
  }

  /// Scores of keys [key, key + kTileKeys), -infinity where a row does not look.
  void score(int64_t key) {
    unpack(tile.cache.keys, key);
    std::memset(scores, 0, kTileKeys * kTileRows * sizeof(float));
    multiply_tile(rows, columns, 1, queries, tile.n, kTileKeys, scores);
    const int32_t window = int32_t(tile.window ? tile.window : past_last_key());
    if (key + kTileKeys <= positions[0] + 1 && key > positions[kTileRows - 1] - window) return;
    for (int32_t k = 0; k < kTileKeys; ++k)
      for (int r = 0; r < kTileRows; ++r) {
        const int32_t before = positions[r] - int32_t(key) - k;
        float& s = scores[k * kTileRows + r];
        s = before >= 0 && before < window ? s : -std::numeric_limits<float>::infinity();
      }
  }

  /// Weights of the scores against the greatest so far; nothing where a row does not look.
  void weigh() {
    for (int64_t i = 0; i < kTileKeys * kTileRows; i += kTileRows)
      for (int r = 0; r < kTileRows; ++r) {
        const float s = scores[i + r], weight = exponential(s - most[r]);
        scores[i + r] = s == -std::numeric_limits<float>::infinity() ? 0.0f : weight;
      }
  }

  void take(int64_t key) {
    score(key);
    float before[kTileRows];
    std::memcpy(before, most, sizeof before);
    for (int64_t i = 0; i < kTileKeys * kTileRows; i += kTileRows)
      for (int r = 0; r < kTileRows; ++r) most[r] = scores[i + r] > most[r] ? scores[i + r] : most[r];
    weigh();
    float fade[kTileRows];
    for (int r = 0; r < kTileRows; ++r) fade[r] = exponential(before[r] - most[r]), total[r] *= fade[r];
    for (int64_t i = 0; i < kTileKeys * kTileRows; i += kTileRows)
      for (int r = 0; r < kTileRows; ++r) total[r] += scores[i + r];
    for (int64_t i = 0; i < columns * kTileRows; i += kTileRows)
      for (int r = 0; r < kTileRows; ++r) sums[i + r] *= fade[r];
    unpack(tile.cache.values, key);
    multiply_tile(rows, 1, columns, scores, kTileKeys, columns, sums);
  }

  void finish() const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      float* out = tile.out + offset_of(r);
      for (int64_t i = 0; i < tile.n; ++i) out[i] = sums[i * kTileRows + r] / total[r];
    }
  }

  /// Adds what the keys from `tile.start` on get of the rows from tile.weighed on.
  void receive() {
    for (int64_t key = tile.start / kTileKeys * kTileKeys; key < past_last_key(); key += kTileKeys) {
      score(key);
      weigh();
      for (int64_t k = 0; k < kTileKeys; ++k) {
        if (key + k < tile.start || key + k >= past_last_key()) continue;
        float& received = tile.received[key + k - tile.start];
        for (int64_t r = tile.weighed; r < tile.rows; ++r) received += scores[k * kTileRows + r] / total[r];
      }
    }
  }
};

/// A value that is not finite spoils all rows of the tile, whether they look there or not: nothing times NaN is NaN.
void attend_tile(const PromptTile& tile, float* scratch) {
  TileState state(tile, scratch);
  for (int64_t key = state.first_key(); key < state.past_last_key(); key += kTileKeys) state.take(key);
  state.finish();
  if (tile.weighed < tile.rows) state.receive();
}

}  // namespace
}  // namespace dymoe

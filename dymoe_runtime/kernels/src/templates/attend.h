// Attention over one KV head, for one token and for tiles of a prompt.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "templates/attend_codes.h"
#include "templates/rows.h"
#include "templates/sources.h"

namespace dymoe {
namespace {

static_assert(kCacheRows == 4, "fold_rows adds up four sums");

/// Writes the sum of the lanes of each row's vector.
DYMOE_INLINE void fold_rows(const Floats (&rows)[kCacheRows], float* out) {
#if defined(__AVX2__)
  __m256 half[kCacheRows];
  DYMOE_UNROLL for (int r = 0; r < kCacheRows; ++r) {
#if defined(__AVX512F__)
    const __m512 all = __m512(rows[r]);
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
    half[r] = _mm256_add_ps(_mm512_castps512_ps256(all), high);
#else
    half[r] = __m256(rows[r]);
#endif
  }
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  DYMOE_UNROLL for (int r = 0; r < kCacheRows; ++r) out[r] = fold_vector<kLanes>(rows[r]);
#endif
}

/// Computes out[r] = x . rows[r] for kCacheRows rows of n floats.
void multiply_rows(const float* x, const float* rows, int64_t n, float* out) {
  Floats even[kCacheRows] = {}, odd[kCacheRows] = {};  // twice as many sums, so that additions wait less
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Floats first = load_lanes(x + i), second = load_lanes(x + i + kLanes);
    DYMOE_UNROLL for (int r = 0; r < kCacheRows; ++r) {
      even[r] = multiply_add(first, load_lanes(rows + r * n + i), even[r]);
      odd[r] = multiply_add(second, load_lanes(rows + r * n + i + kLanes), odd[r]);
    }
  }
  for (; i + kLanes <= n; i += kLanes)
    DYMOE_UNROLL for (int r = 0; r < kCacheRows; ++r) even[r] =
        multiply_add(load_lanes(x + i), load_lanes(rows + r * n + i), even[r]);
  DYMOE_UNROLL for (int r = 0; r < kCacheRows; ++r) even[r] += odd[r];
  fold_rows(even, out);
  for (; i < n; ++i)
    for (int r = 0; r < kCacheRows; ++r) out[r] += x[i] * rows[r * n + i];
}

/// Computes out += sum over r of weights[r] * rows[r], for kCacheRows rows of n floats.
void add_rows(const float* weights, const float* rows, int64_t n, float* out) {
  Floats weight[kCacheRows];
  DYMOE_UNROLL for (int r = 0; r < kCacheRows; ++r) weight[r] = weights[r] - Floats{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats sum = load_lanes(out + i);
    DYMOE_UNROLL for (int r = 0; r < kCacheRows; ++r) sum = multiply_add(weight[r], load_lanes(rows + r * n + i), sum);
    store_lanes(out + i, sum);
  }
  for (; i < n; ++i)
    for (int r = 0; r < kCacheRows; ++r) out[i] += weights[r] * rows[r * n + i];
}

/// See Kernels::attend.
void attend(const float* queries, int64_t heads, const CacheRows& cache, int64_t count, int64_t n, const float* sinks,
            float* scores, float* rows, float* out) {
  if (attends_to_codes(n, cache.bits)) return attend_codes(queries, heads, cache, count, n, sinks, scores, out);
  const float size = 1.0f / std::sqrt(float(n));
  const int64_t pitch = count + 1;  // with room for a sink
  const auto unpack = [&](const uint8_t* from, int64_t p) {
    const int64_t there = count - p < kCacheRows ? count - p : kCacheRows;
    for (int64_t r = 0; r < there; ++r) unpack_row(from + (p + r) * cache.pitch, cache.bits, n, rows + r * n);
    return there;
  };
  for (int64_t p = 0; p < count; p += kCacheRows) {
    const int64_t there = unpack(cache.keys, p);
    for (int64_t h = 0; h < heads; ++h) {
      float* to = scores + h * pitch + p;
      if (there == kCacheRows) {
        multiply_rows(queries + h * n, rows, n, to);
      } else {
        for (int64_t r = 0; r < there; ++r) to[r] = dot_floats(queries + h * n, rows + r * n, n);
      }
      for (int64_t r = 0; r < there; ++r) to[r] *= size;
    }
  }
  std::memset(out, 0, heads * n * sizeof(float));
  for (int64_t h = 0; h < heads; ++h) {
    float* weights = scores + h * pitch;
    if (sinks) weights[count] = sinks[h];
    const float inverse = 1.0f / exponentials(weights, sinks ? count + 1 : count);
    for (int64_t p = 0; p < count; ++p) weights[p] *= inverse;
  }
  for (int64_t p = 0; p < count; p += kCacheRows) {
    const int64_t there = unpack(cache.values, p);
    for (int64_t h = 0; h < heads; ++h) {
      const float* weights = scores + h * pitch + p;
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

// The rows of a tile lie in the lanes of two vectors, so that maxima and sums over keys need no work across lanes.
constexpr int kTileVectors = 2, kTileRows = kTileVectors * kLanes;
static_assert(kTileRows <= kMaxTileRows);
constexpr int kTileUnroll = kLanes == 8 ? 4 : 8;  // as many sums as the registers hold
static_assert(kTileKeys % kTileUnroll == 0 && kTileColumns % kTileUnroll == 0);

/// Computes c[j] += sum over i < depth of a[j * across + i * along] * b[i] for j < count. Each b[i] and c[j] is
/// kTileRows floats.
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

/// The state of one tile while keys pass by, kTileKeys at a time. The softmax is updated with each group (arXiv
/// 2205.14135).
struct TileState {
  const PromptTile& tile;
  int64_t columns;                          // tile_columns(tile.n)
  float *queries, *sums, *scores, *rows;    // [columns, kTileRows] twice, [kTileKeys, kTileRows], [kTileKeys, columns]
  int32_t positions[kTileRows];             // of each row's token
  int32_t firsts[kTileRows];                // first position that each row sees
  float most[kTileRows], total[kTileRows];  // of each row: greatest score, and sum of weights, over the keys so far

  /// Loads the queries; lanes without a row repeat the last row.
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
      firsts[r] = first_seen(positions[r]);
      most[r] = std::numeric_limits<float>::lowest(), total[r] = 0.0f;
      if (!tile.sinks) continue;
      const float sink = tile.sinks[(tile.first + row) % tile.group];
      most[r] = sink < most[r] ? most[r] : sink, total[r] = 1.0f;
    }
  }

  /// Returns the offset of a row in tile.queries and tile.out.
  int64_t offset_of(int64_t row) const {
    return (tile.first + row) / tile.group * tile.pitch + (tile.first + row) % tile.group * tile.n;
  }
  const float* query_of(int64_t row) const { return tile.queries + offset_of(row); }
  int64_t past_last_key() const { return positions[kTileRows - 1] + 1; }

  /// Returns the first position that a token at `position` sees.
  int32_t first_seen(int64_t position) const {
    const int64_t windowed = tile.window ? position + 1 - tile.window : 0;
    const int64_t chunked = tile.chunk ? position / tile.chunk * tile.chunk : 0;
    return int32_t(windowed > chunked ? windowed : chunked);
  }

  /// Returns the first key to compute, rounded down to a multiple of kTileKeys.
  int64_t first_key() const { return firsts[0] / kTileKeys * kTileKeys; }

  /// Unpacks up to kTileKeys keys or values from position `key` on into `rows`.
  void unpack(const uint8_t* from, int64_t key) {
    const int64_t count = past_last_key() - key < kTileKeys ? past_last_key() - key : kTileKeys;
    for (int64_t k = 0; k < count; ++k)
      unpack_row(from + (key + k) * tile.cache.pitch, tile.cache.bits, tile.n, rows + k * columns);
  }

  /// Computes the scores of keys [key, key + kTileKeys); -infinity where a row does not attend to a key.
  void score(int64_t key) {
    unpack(tile.cache.keys, key);
    std::memset(scores, 0, kTileKeys * kTileRows * sizeof(float));
    multiply_tile(rows, columns, 1, queries, tile.n, kTileKeys, scores);
    if (key + kTileKeys <= positions[0] + 1 && key >= firsts[kTileRows - 1]) return;
    for (int32_t k = 0; k < kTileKeys; ++k)
      for (int r = 0; r < kTileRows; ++r) {
        const int32_t at = int32_t(key) + k;
        float& s = scores[k * kTileRows + r];
        s = at <= positions[r] && at >= firsts[r] ? s : -std::numeric_limits<float>::infinity();
      }
  }

  /// Replaces each score by exp(score - greatest score so far); 0 where a row does not attend to a key.
  void weigh() {
    for (int64_t i = 0; i < kTileKeys * kTileRows; i += kTileRows)
      for (int r = 0; r < kTileRows; ++r) {
        const float s = scores[i + r], weight = exponential(s - most[r]);
        scores[i + r] = choose(s == -std::numeric_limits<float>::infinity(), 0.0f, weight);
      }
  }

  /// Adds keys and values [key, key + kTileKeys) to the softmax and the sums.
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

  /// Writes the outputs.
  void finish() const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      float* out = tile.out + offset_of(r);
      for (int64_t i = 0; i < tile.n; ++i) out[i] = sums[i * kTileRows + r] / total[r];
    }
  }

  /// Adds the attention of rows from tile.weighed on, to keys from tile.start on, to tile.received.
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

/// See Kernels::attend_tile. Where an attention value is not finite, its column of the output is not finite in any row
/// of the tile, even in rows that do not attend to its key: 0 * infinity and 0 * NaN are NaN.
void attend_tile(const PromptTile& tile, float* scratch) {
  TileState state(tile, scratch);
  for (int64_t key = state.first_key(); key < state.past_last_key(); key += kTileKeys) state.take(key);
  state.finish();
  if (tile.weighed < tile.rows) state.receive();
}

}  // namespace
}  // namespace dymoe

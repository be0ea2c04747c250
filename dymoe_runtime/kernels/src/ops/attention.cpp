#include "ops/attention.h"

#include <algorithm>
#include <cstring>

#include "ops/workspace.h"

namespace dymoe {
namespace {

thread_local Buffer<float> scratch;

int64_t tiles_of(const Kernels& isa, const Prompt& p) {
  const int64_t rows = p.tokens * (p.heads / p.kv_heads);
  return (rows + isa.tile_rows - 1) / isa.tile_rows;
}

/// Returns the index of the first tile of a KV head that has rows of the last tokens.
int64_t first_receiving(const Kernels& isa, const Prompt& p) {
  return (p.tokens - p.last) * (p.heads / p.kv_heads) / isa.tile_rows;
}

}  // namespace

int64_t cache_row_bytes(int64_t n, int bits) {
  return bits == 8 ? n + 2 * ((n + kCacheGroup - 1) / kCacheGroup) : n * bits / 8;
}

CacheRows rows_from(const LayerCache& cache, int64_t head, int64_t first, int64_t n) {
  const int64_t pitch = cache_row_bytes(n, cache.bits), at = (head * cache.capacity + first) * pitch;
  return {cache.keys + at, cache.values + at, pitch, cache.bits};
}

int64_t receiving_parts(const Kernels& isa, const Prompt& p) {
  return p.last ? p.kv_heads * (tiles_of(isa, p) - first_receiving(isa, p)) : 0;
}

void append(const Kernels& isa, const Prompt& p, const float* keys, const float* values, const LayerCache& cache) {
  const int64_t pitch = cache_row_bytes(p.n, cache.bits);
  parallel_ranges(p.tokens, 1, p.tokens * p.kv_heads * p.n / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * p.kv_heads; i < end * p.kv_heads; ++i) {
      const int64_t row = i % p.kv_heads * cache.capacity + p.start + i / p.kv_heads;
      isa.pack_row(keys + i * p.n, p.n, cache.bits, cache.keys + row * pitch);
      isa.pack_row(values + i * p.n, p.n, cache.bits, cache.values + row * pitch);
    }
  });
}

void attend_prompt(const Kernels& isa, const Prompt& p, const float* queries, const LayerCache& cache, float* out,
                   float* received) {
  const int64_t group = p.heads / p.kv_heads, rows = p.tokens * group, tiles = tiles_of(isa, p);
  const int64_t first = p.last ? first_receiving(isa, p) : tiles, parts = tiles - first;
  if (parts) std::memset(received, 0, p.kv_heads * parts * p.tokens * sizeof(float));
  // The last tiles attend to the most keys and take longest, so they go first.
  parallel_for(p.kv_heads * tiles, [&](int64_t i) {
    const int64_t index = tiles - 1 - i / p.kv_heads, head = i % p.kv_heads;
    PromptTile tile{};
    tile.first = index * isa.tile_rows;
    tile.rows = std::min(isa.tile_rows, rows - tile.first);
    tile.group = group, tile.pitch = p.heads * p.n, tile.n = p.n;
    tile.start = p.start, tile.window = p.window, tile.chunk = p.chunk;
    tile.sinks = p.sinks ? p.sinks + head * group : nullptr;
    tile.queries = queries + head * group * p.n, tile.out = out + head * group * p.n;
    tile.cache = rows_from(cache, head, 0, p.n);
    tile.weighed = tile.rows;
    if (index >= first) {
      tile.weighed = std::max<int64_t>(0, (p.tokens - p.last) * group - tile.first);
      tile.received = received + (head * parts + index - first) * p.tokens;
    }
    isa.attend_tile(tile, scratch.reserve(tile_floats(p.n)));
  });
}

void attend_token(const Kernels& isa, const Prompt& one, const float* queries, const LayerCache& cache, float* out) {
  thread_local Buffer<float> kept;
  const int64_t n = one.n, group = one.heads / one.kv_heads, end = one.start + 1;
  const int64_t windowed = one.window ? end - one.window : 0;
  const int64_t chunked = one.chunk ? one.start / one.chunk * one.chunk : 0;
  const int64_t first = std::max(windowed, chunked), count = end - first;
  float* scores = kept.reserve(one.heads * (count + 1));
  parallel_ranges(one.kv_heads, 1, one.heads * count * n / kBlock * kFloatWork, [&](int64_t begin, int64_t stop) {
    thread_local Buffer<float> rows;
    for (int64_t g = begin; g < stop; ++g)
      isa.attend(queries + g * group * n, group, rows_from(cache, g, first, n), count, n,
                 one.sinks ? one.sinks + g * group : nullptr, scores + g * group * (count + 1),
                 rows.reserve(kCacheRows * n), out + g * group * n);
  });
}

}  // namespace dymoe

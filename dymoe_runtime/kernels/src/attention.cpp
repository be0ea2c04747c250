#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "workspace.h"

namespace dymoe {
namespace {

thread_local Buffer<float> scratch;

int64_t tiles_of(const Kernels& isa, const Prompt& p) {
  const int64_t rows = p.tokens * (p.heads / p.kv_heads);
  return (rows + isa.tile_rows - 1) / isa.tile_rows;
}

/// The first tile of a KV head that has rows of the last tokens.
int64_t first_receiving(const Kernels& isa, const Prompt& p) {
  return (p.tokens - p.last) * (p.heads / p.kv_heads) / isa.tile_rows;
}

}  // namespace

int64_t cache_row_bytes(int64_t n, int bits) {
  return bits == 8 ? n + 2 * ((n + kCacheGroup - 1) / kCacheGroup) : n * bits / 8;
}

void pack_row(const float* x, int64_t n, int bits, uint8_t* row) {
  if (bits == 32) {
    std::memcpy(row, x, n * sizeof(float));
    return;
  }
  const auto put_half = [](float value, uint8_t* to) {
    const uint16_t half = float_to_half(value);
    std::memcpy(to, &half, sizeof half);
  };
  if (bits == 16) {
    for (int64_t i = 0; i < n; ++i) put_half(x[i], row + 2 * i);
    return;
  }
  for (int64_t i = 0; i < n; i += kCacheGroup) {
    const int64_t end = std::min(n, i + kCacheGroup);
    float most = 0.0f;
    bool finite = true;
    for (int64_t j = i; j < end; ++j) finite &= bool(std::isfinite(x[j])), most = std::max(most, std::fabs(x[j]));
    const uint16_t half = float_to_half(finite ? most / 127.0f : NAN);
    std::memcpy(row + n + 2 * (i / kCacheGroup), &half, sizeof half);
    const float scale = half_to_float(half);
    for (int64_t j = i; j < end; ++j) {
      const float code = scale > 0.0f ? std::nearbyint(x[j] / scale) : 0.0f;
      row[j] = uint8_t(int8_t(std::clamp(code, -127.0f, 127.0f)));
    }
  }
}

CacheRows rows_from(const LayerCache& cache, int64_t head, int64_t first, int64_t n) {
  const int64_t pitch = cache_row_bytes(n, cache.bits), at = (head * cache.capacity + first) * pitch;
  return {cache.keys + at, cache.values + at, pitch, cache.bits};
}

int64_t receiving_parts(const Kernels& isa, const Prompt& p) {
  return p.last ? p.kv_heads * (tiles_of(isa, p) - first_receiving(isa, p)) : 0;
}

void attend_prompt(const Kernels& isa, const Prompt& p, const float* queries, const LayerCache& cache, float* out,
                   float* received) {
  const int64_t group = p.heads / p.kv_heads, rows = p.tokens * group, tiles = tiles_of(isa, p);
  const int64_t first = p.last ? first_receiving(isa, p) : tiles, parts = tiles - first;
  if (parts) std::memset(received, 0, p.kv_heads * parts * p.tokens * sizeof(float));
  // The last tiles see most, so they go first.
  parallel_for(p.kv_heads * tiles, [&](int64_t i) {
    const int64_t index = tiles - 1 - i / p.kv_heads, head = i % p.kv_heads;
    PromptTile tile{};
    tile.first = index * isa.tile_rows;
    tile.rows = std::min(isa.tile_rows, rows - tile.first);
    tile.group = group, tile.pitch = p.heads * p.n, tile.n = p.n;
    tile.start = p.start, tile.window = p.window;
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

}  // namespace dymoe

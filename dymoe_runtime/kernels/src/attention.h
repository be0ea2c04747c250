// The KV cache's rows, and attention of a prompt.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dymoe {

/// Bytes of a row of n floats that the cache keeps at `bits`, 32, 16 or 8: kv_cache.py defines them.
int64_t cache_row_bytes(int64_t n, int bits);

/// Keys and values of one layer, rows [kv_heads, capacity] each.
struct LayerCache {
  uint8_t *keys, *values;
  int64_t capacity;
  int bits;
};

/// Rows of a KV head from position `first` on.
CacheRows rows_from(const LayerCache& cache, int64_t head, int64_t first, int64_t n);

struct Prompt {
  int64_t tokens, heads, kv_heads, n;
  int64_t start;   // position of the first token
  int64_t window;  // positions that a token sees, 0 for all
  int64_t last;    // so many tokens at the end tell what each token received
};

/// Keeps keys and values [tokens, kv_heads, n].
void append(const Kernels& isa, const Prompt& prompt, const float* keys, const float* values, const LayerCache& cache);

/// Lists of what is received that `attend_prompt` fills: one for each part of the work.
int64_t receiving_parts(const Kernels& isa, const Prompt& prompt);

/// Causal attention of queries [tokens, heads, n], whose own keys and values are in the cache already;
/// out alike. received [receiving_parts, tokens]: its sum over the parts is the attention that each token
/// gets from the last ones.
void attend_prompt(const Kernels& isa, const Prompt& prompt, const float* queries, const LayerCache& cache, float* out,
                   float* received);

}  // namespace dymoe

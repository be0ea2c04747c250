// The rows of the KV cache, and the attention of a prompt.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dymoe {

/// Returns the bytes of a cache row of n columns at `bits`, which is 32, 16 or 8. kv_cache.py defines rows.
int64_t cache_row_bytes(int64_t n, int bits);

/// Keys and values of one layer: rows [kv_heads, capacity] of each.
struct LayerCache {
  uint8_t *keys, *values;
  int64_t capacity;  // positions
  int bits;          // 32, 16 or 8
};

/// Returns the rows of KV head `head` from position `first` on; heads have n columns.
CacheRows rows_from(const LayerCache& cache, int64_t head, int64_t first, int64_t n);

/// The shape of a prompt, or of the chunk of a prompt that one call handles.
struct Prompt {
  int64_t tokens, heads, kv_heads, n;  // n: columns of a head
  int64_t start;                       // position of the first token
  int64_t window;                      // positions that a token sees, itself included; 0 for all
  int64_t last;                        // number of last tokens whose attention goes to `received`; 0 for none
  int64_t chunk;                       // a token sees only positions of its own chunk of that many; 0 for no chunks
  const float* sinks;                  // [heads], scores in each softmax that have no value; null for none
};

/// Packs keys and values [tokens, kv_heads, n] into the cache, at the positions of the prompt.
void append(const Kernels& isa, const Prompt& prompt, const float* keys, const float* values, const LayerCache& cache);

/// Returns the rows of `received` that `attend_prompt` fills: one for each tile that has rows of the last tokens.
int64_t receiving_parts(const Kernels& isa, const Prompt& prompt);

/// Computes the causal attention of queries [tokens, heads, n] into out [tokens, heads, n]. The cache must already hold
/// the keys and values of the prompt. received is [receiving_parts, tokens]; summed over the parts, it is the attention
/// that each token gets from the `last` tokens.
void attend_prompt(const Kernels& isa, const Prompt& prompt, const float* queries, const LayerCache& cache, float* out,
                   float* received);

/// Computes the attention of a prompt of one token, which decodes faster than `attend_prompt`: queries and out are
/// [heads, n]. The cache must already hold the key and value of the token.
void attend_token(const Kernels& isa, const Prompt& one, const float* queries, const LayerCache& cache, float* out);

}  // namespace dymoe

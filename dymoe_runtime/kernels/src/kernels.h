// The data that the kernels of every instruction set read and write, and the table of functions that each provides.
#pragma once

#include <cstdint>

#include "trellis_tables.h"

namespace dymoe {

constexpr int64_t kBlock = 64;                // columns of a block
constexpr int64_t kGroup = 16;                // scale indices that are read together, as one word
constexpr int64_t kScratchRows = 16;          // most rows that `product` unpacks at once; half as many if it pairs them
constexpr int64_t kMaxAtOnce = 4;             // most blocks that a kernel multiplies together
constexpr int kMaxPlanes = 8, kMaxTiers = 7;  // of one matrix

/// The grids of tiers.py, which decide the levels of codes, the sizes of scales, and how many columns share a scale: a
/// block, but half a block on the grid of MXFP4.
enum class Grid { usual, mxfp4, trellis };

/// Returns the scales of a block.
static constexpr int64_t scales_of_block(Grid grid) { return grid == Grid::mxfp4 ? 2 : 1; }

// Scale sizes by their 4-bit scale index: SCALE_SIZES and MX_SIZES of tiers.py.
alignas(64) constexpr float kScaleSizes[16] = {0.0f,   1.0f,   1.108f, 1.229f, 1.362f, 1.51f, 1.673f, 1.855f,
                                               2.056f, 2.279f, 2.526f, 2.8f,   7.0f,   17.5f, 43.75f, 109.375f};
alignas(64) constexpr float kMxSizes[16] = {0x1p-0f,  0x1p-1f,  0x1p-2f,  0x1p-3f, 0x1p-4f,  0x1p-5f,
                                            0x1p-6f,  0x1p-7f,  0x1p-8f,  0x1p-9f, 0x1p-10f, 0x1p-11f,
                                            0x1p-12f, 0x1p-13f, 0x1p-14f, 0x1p-15f};

/// The levels of a tier's codes: level = number - centre. A scale is multiplier * unit * scale size, as tiers.py
/// defines it.
struct Levels {
  const uint8_t* numbers;  // [16], by code; null for tiers of more than 4 bits, where a code is its own number
  float centre, unit;
};

/// Returns the level of a code. Static, like the functions below: otherwise a version compiled for a newer processor
/// could be linked into code for an older one.
static constexpr float level_of(const Levels& levels, int code) {
  return float(levels.numbers ? levels.numbers[code] : code) - levels.centre;
}

/// Returns the whole numbers from -2^(bits - 1) on, which are no levels of the bundle format.
static constexpr Levels whole_numbers(int bits) { return {nullptr, float(1 << (bits - 1)), 1.0f}; }

constexpr int kMaxCurved = 4;  // most bits of a ladder whose levels are CURVED, or those of MXFP4; see tiers.py

// Numbers by code: CURVED of tiers.py for 2, 3 and 4 bits; in the last row, each code is its own number.
alignas(16) constexpr uint8_t kNumbers[4][16] = {
    {4, 23, 40, 59},
    {10, 18, 24, 29, 34, 39, 45, 53},
    {1, 9, 14, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45, 49, 54, 62},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
};
constexpr float kCurvedUnits[3] = {0.0433f, 0.1539f, 0.2590f};  // CURVED_UNITS of tiers.py

// MX_NUMBERS and MX_UNITS of tiers.py, for 2, 3 and 4 bits. The highest number is twice the centre.
alignas(16) constexpr uint8_t kMxNumbers[3][16] = {
    {0, 17, 29, 46},
    {0, 14, 21, 26, 30, 35, 42, 56},
    {0, 4, 6, 8, 9, 10, 11, 12, 12, 13, 14, 15, 16, 18, 20, 24},
};
constexpr float kMxUnits[3] = {0.125f, float(1.0 / 6.0), 0.5f};

/// Returns the levels of the tier `bits` in a ladder whose highest tier is `top`, at most kMaxCurved for MXFP4 and
/// kMaxTrellis for trellis codes, where numbers are those of the first plane by its entries.
static constexpr Levels levels_of(int bits, int top, Grid grid = Grid::usual) {
  if (grid == Grid::trellis) return {kTrellisNumbers[bits - 2], kTrellisCentres[bits - 2], kTrellisUnits[bits - 2]};
  if (grid == Grid::mxfp4) {
    const uint8_t* numbers = kMxNumbers[bits - 2];
    return {numbers, 0.5f * float(numbers[(1 << bits) - 1]), kMxUnits[bits - 2]};
  }
  if (top <= kMaxCurved) return {kNumbers[bits - 2], 31.5f, kCurvedUnits[bits - 2] * float(1 << (top - bits))};
  return {bits <= kMaxCurved ? kNumbers[3] : nullptr, 0.5f * float((1 << bits) - 1), float(1 << (top - bits))};
}

/// Returns the bytes of the codes of one token or one row, where `blocks` is rounded up to a multiple of kMaxAtOnce.
static constexpr int64_t codes_pitch(int64_t blocks) {
  return (blocks + kMaxAtOnce - 1) / kMaxAtOnce * kMaxAtOnce * kBlock;
}

/// Returns where in a row the code of a column of a block lies. Blocks that are multiplied together are interleaved in
/// pieces of 16 columns: first the first piece of each block, then the second piece of each block, and so on.
static constexpr int64_t place(int64_t at_once, int64_t block, int64_t column) {
  return ((block / at_once * (kBlock / 16) + column / 16) * at_once + block % at_once) * 16 + column % 16;
}

/// Returns the bytes of scratch memory for one unpacked row: codes and scale sizes on any grid.
static constexpr int64_t scratch_row_bytes(int64_t blocks) {
  return codes_pitch(blocks) + (blocks + kGroup - 1) / kGroup * kGroup * 2 * int64_t(sizeof(float));
}

/// Returns the bytes of a row of symbols of the trellis grid.
static constexpr int64_t symbol_bytes(int64_t blocks) { return 16 * blocks; }

/// Returns the bytes of scratch memory that `product` needs: codes and scale sizes of kScratchRows rows, on any grid,
/// and a row of symbols.
static constexpr int64_t scratch_bytes(int64_t blocks) {
  return kScratchRows * scratch_row_bytes(blocks) + symbol_bytes(blocks);
}

/// Returns the bytes of one row's scale indices.
static constexpr int64_t scale_index_bytes(int64_t blocks, Grid grid = Grid::usual) {
  return (blocks * scales_of_block(grid) + 1) / 2;
}

/// One plane of a matrix.
struct PlaneView {
  int width;            // bits of each code
  const uint8_t* data;  // [rows, blocks, 8 * width]
};

/// One matrix at one tier, as pointers into the segments of a record. The pointers may be unaligned.
struct MatrixView {
  int64_t rows, cols, blocks;    // blocks: of a row; the last one may have fewer than kBlock columns
  int bits;                      // the tier
  Grid grid;                     // MXFP4 has kMaxCurved bits at most
  int planes;                    // entries of `plane`
  PlaneView plane[kMaxPlanes];   // most significant first
  const uint8_t* scale_indices;  // [rows, scale_index_bytes(blocks, grid)], scale 2i in the low nibble of byte i
  const uint8_t* multiplier;     // bf16 [rows]
  Levels levels;
};

constexpr int64_t kCopies = 4;  // of each scale of a token: vectors hold the sums of a block in four lanes

/// Tokens quantized to int8 by blocks. The order of codes (see `place`) depends on the kernels that quantized them.
/// `pitch` is `blocks` rounded up to a multiple of kGroup; scales and sums past the last block are 0.
struct Activations {
  int64_t tokens, blocks, pitch;
  int8_t* codes;     // [tokens, codes_pitch(blocks)], in -127..127
  float* scales;     // [tokens, pitch, kCopies], each as often as kernels want it; NaN if a block is not finite
  float* sums;       // [tokens, pitch], scale times the sum of the codes of a block
  float* half_sums;  // [tokens, pitch, 2], the same for each half of a block
  // Only of kernels that fold, see product.h: scales and sums [tokens, pitch] in the order of folded lanes, and folded
  // codes [tokens, codes_pitch(blocks)]; these are null if fewer than Kernels::folds_from tokens were quantized
  // together.
  float *folded_scales, *folded_sums;
  int8_t* folded_codes;
  // Only of kernels that transpose: codes [blocks, kBlock / 4, transposed_pitch, 4], scales and sums
  // [blocks, transposed_pitch], with tokens side by side; null if fewer than Kernels::transposes_from tokens were
  // quantized together. `transposed_pitch` is at least `tokens` + kBeside. Scales and sums beyond the tokens are 0,
  // codes undefined.
  int64_t transposed_pitch;
  int8_t* transposed_codes;
  float *transposed_scales, *transposed_sums;
};

constexpr int64_t kBeside = 15;  // most tokens that kernels read beyond the last one of those side by side

/// One block of columns of a matrix while its codes are chosen; see descend.h. The error of a tier is scale * level -
/// weight, and its slope is the error times the Hessian. Coordinate descent minimizes the sum over tiers of
/// weight * trace(error . Hessian . error^T).
struct Descent {
  int tiers;
  int bits[kMaxTiers];       // of each tier, rising
  float weights[kMaxTiers];  // of each tier in the sum
  int64_t rows, cols;        // cols of the block, at most kBlock
  int64_t pitch;             // columns of the whole matrix
  bool last;                 // whether to fit the scales once more to the chosen codes
  bool whole;                // whether levels are the whole numbers code - 2^(bits - 1); the only tier has them
  const float* hessian;      // [cols, cols] of the block
  int64_t hessian_pitch;     // floats from one row to the next
  const float* slope;        // [tiers, rows, cols]
  const float* units;        // [tiers, rows]: a scale is a unit times one of kScaleSizes; null if any scale will do
  float* scales;             // [tiers, rows]
  float* error;              // [tiers, rows, pitch]; points to the first column of the block
  uint8_t* codes;            // [rows, pitch]; points to the first column of the block
  bool trellis;              // whether codes are those of the trellis grid; see descent/trellis.h
  const float* weight;       // [rows, pitch], likewise: in the first visit, when there are no codes; else null
};

constexpr int64_t kCacheGroup = 32;  // columns of an 8-bit row of the KV cache that share a scale
constexpr int64_t kCacheRows = 4;    // rows of the KV cache that are unpacked at a time

/// Keys and values of one KV head, as rows that kv_cache.py defines: one for each position.
struct CacheRows {
  const uint8_t *keys, *values;
  int64_t pitch;  // bytes from one row to the next
  int bits;       // 8, 16 or 32
};

// Of a PromptTile: most rows, keys that are scored together, and what the columns of a head are padded to.
constexpr int64_t kMaxTileRows = 32, kTileKeys = 64, kTileColumns = 8;

/// Returns n rounded up to a multiple of kTileColumns.
static constexpr int64_t tile_columns(int64_t n) { return (n + kTileColumns - 1) / kTileColumns * kTileColumns; }

/// Returns the floats of scratch memory that `attend_tile` needs for heads of n columns.
static constexpr int64_t tile_floats(int64_t n) {
  return 2 * tile_columns(n) * kMaxTileRows + kTileKeys * (kMaxTileRows + tile_columns(n));
}

/// Rows of a prompt's attention for one KV head. Row r is token r / group and head r % group of the heads that share
/// the KV head. The tile has the rows [first, first + rows).
struct PromptTile {
  int64_t first, rows, group;
  int64_t pitch;          // floats from one token to the next, in queries and out
  int64_t n;              // columns of a head
  int64_t start, window;  // position of token 0; positions that a token sees, itself included, 0 for all
  int64_t chunk;          // a token sees only positions of its own chunk of that many; 0 for no chunks
  const float* sinks;     // [group], scores that take part in the softmax, but have no value; null for none
  const float* queries;   // of token 0, first head of the group
  float* out;             // like queries
  CacheRows cache;        // from position 0 on
  int64_t weighed;        // the tile's rows from this one on add their attention to `received`
  float* received;        // [tokens], of the positions from `start` on
};

/// What a gated MLP makes of gate and up: act(gate) * up, where gelu_tanh is the tanh approximation of gelu. For
/// clamped_swiglu it is g * sigmoid(alpha * g) * (u + 1), where g is the gate, at most `limit`, and u is up, from
/// -limit to limit.
enum class ActivationKind { silu, gelu, gelu_tanh, clamped_swiglu };

/// An activation with its parameters.
struct Activation {
  ActivationKind kind;
  float alpha = 0.0f, limit = 0.0f;  // of clamped_swiglu
};

constexpr int64_t kMaxTaps = 16;       // of a Convolution
constexpr int64_t kDeltaColumns = 32;  // of a head's memory that are kept together while many tokens pass by

/// A causal convolution of each channel by itself, followed by silu. Inputs are the rows of `tail`, then those of
/// `mixed`; token t sees the inputs t to t + taps - 1.
struct Convolution {
  int64_t first, tokens;      // tokens [first, first + tokens) of the rows of `mixed`
  int64_t channels, taps;     // of tail [taps - 1, channels], mixed [.., channels] and conv
  const float *tail, *mixed;  // the last inputs of earlier calls, and the inputs of this one
  const float* conv;          // [channels, taps]
  float* out;                 // of token `first`
  int64_t pitch;              // floats from one token to the next, in out
};

/// The gated delta rule of one head for some tokens: for each token
///   memory = memory * fade; memory += outer(key, share * (value - key . memory)); y = query . memory
struct DeltaHead {
  int64_t tokens, key_dim, value_dim;
  const float *queries, *keys, *values;  // of token 0
  int64_t pitch;                         // floats from one token to the next, in queries, keys and values
  const float *fades, *shares;           // [tokens]
  float* memory;                         // [key_dim, value_dim]
  float* y;                              // of token 0
  int64_t y_pitch;                       // floats from one token to the next, in y
};

constexpr int kMaxFittedBits = 5;  // highest tier of a Fit

/// A matrix for which `fit` chooses the codes and scales that a descent starts from; see fit.h.
struct Fit {
  int tiers;
  int bits[kMaxTiers];       // of each tier, rising, at most kMaxFittedBits
  float weights[kMaxTiers];  // of each tier's squared error
  int64_t rows, cols;
  const float* weight;      // [rows, cols]
  const float* importance;  // [cols], weight of each column's squared error
  int starts;               // scales to try for each block
  const float* start;       // [starts, rows, blocks], scales of the highest tier
  float* scales;            // [tiers, rows, blocks], the result
  uint8_t* codes;           // [rows, cols], the result
};

/// The functions of one instruction set.
struct Kernels {
  const char* name;
  int64_t at_once;          // blocks that are multiplied together; decides the order of codes, see `place`
  int64_t tile_rows;        // most rows of a PromptTile
  int64_t folds_from;       // fewest tokens that are also quantized to folded codes; 0 for kernels that do not fold
  int64_t transposes_from;  // fewest tokens that are also quantized side by side; 0 for kernels that do not transpose

  /// Quantizes x [cols] as token number `token` of `out`.
  void (*quantize)(const float* x, int64_t cols, int64_t token, const Activations& out);

  /// Computes y[t * stride + r] = activations[t] . matrix[r] for all tokens t and for r in [begin, end). `scratch`
  /// holds scratch_bytes(blocks) bytes and is aligned to 64 bytes. The value of an element does not depend on `begin`,
  /// `end` or the number of tokens.
  void (*product)(const MatrixView& matrix, const Activations& activations, int64_t begin, int64_t end, float* y,
                  int64_t stride, uint8_t* scratch);

  /// Computes hidden[i] = act(hidden[i]) * ups[i], or what clamped_swiglu is, for i in [0, count).
  void (*activate)(Activation activation, int64_t count, const float* ups, float* hidden);

  /// Writes row `row` of the matrix as floats, out [cols]; `scratch` is as for `product`.
  void (*dequantize)(const MatrixView& matrix, int64_t row, float* out, uint8_t* scratch);

  /// Computes out = weight * x / sqrt(mean(x^2) + eps), n floats each; out may be x.
  void (*norm)(const float* x, const float* weight, int64_t n, float eps, float* out);

  /// Computes out = weight * (x - mean(x)) / sqrt(variance(x) + eps) + bias, n floats each; out may be x. A null bias
  /// adds nothing.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* out);

  /// Computes out[r] = rows[r] . x for r in [begin, end); rows [.., n], x [n].
  void (*dots)(const float* rows, int64_t n, int64_t begin, int64_t end, const float* x, float* out);

  /// Replaces x [n] by exp(x - max(x)) and returns the sum.
  float (*exponentials)(float* x, int64_t n);

  /// Packs x [n] into a row of the KV cache, as kv_cache.py defines rows.
  void (*pack_row)(const float* x, int64_t n, int bits, uint8_t* row);

  /// Computes the attention of one token's queries [heads, n], whose heads share a KV head, over the first `count` rows
  /// of `cache`; out [heads, n]. `sinks` [heads] are scores that take part in the softmax, but have no value; null for
  /// none. `scores` holds heads * (count + 1) floats, `rows` kCacheRows * n.
  void (*attend)(const float* queries, int64_t heads, const CacheRows& cache, int64_t count, int64_t n,
                 const float* sinks, float* scores, float* rows, float* out);

  /// Computes the attention of a tile. `scratch` holds tile_floats(n) floats and is aligned to 64 bytes.
  void (*attend_tile)(const PromptTile& tile, float* scratch);

  /// Computes channels [begin, end) of a convolution, of which `out` has no others.
  void (*convolve)(const Convolution& convolution, int64_t begin, int64_t end);

  /// Computes y of one head, which has at least one token, and updates its memory. The value of an element does not
  /// depend on how the tokens are divided into calls. `scratch` holds key_dim * kDeltaColumns floats.
  void (*delta)(const DeltaHead& head, float* scratch);

  int64_t descent_bytes;  // of the scratch memory of `descend`

  /// Improves the scales and codes of rows [row, row + rows) and updates the error. On the trellis grid `row` begins a
  /// group, and `rows` end one. `scratch` is aligned to 64 bytes.
  void (*descend)(const Descent& block, int64_t row, int64_t rows, uint8_t* scratch);

  /// Chooses the codes and scales of rows [row, row + rows).
  void (*fit)(const Fit& fit, int64_t row, int64_t rows);
};

}  // namespace dymoe

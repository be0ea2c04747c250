// What the kernels of every instruction set read and write, and the table that each provides.
#pragma once

#include <cstdint>

namespace dymoe {

constexpr int64_t kBlock = 64;      // columns that share a step
constexpr int64_t kGroup = 16;      // blocks whose steps are read at once
constexpr int64_t kScratchRows = 16; // most rows that `product` unpacks at once; half, where it also puts them in pairs
constexpr int64_t kMostAtOnce = 4;  // blocks that a kernel multiplies together
constexpr int kMaxPlanes = 8, kMaxTiers = 7;

// What the 4-bit steps stand for: STEPS of tiers.py.
alignas(64) constexpr float kSteps[16] = {
    0.0f, 1.0f, 1.108f, 1.229f, 1.362f, 1.51f, 1.673f, 1.855f, 2.056f, 2.279f, 2.526f, 2.8f, 7.0f, 17.5f, 43.75f, 109.375f};

/// What the codes of a tier stand for: level = number - centre, and scales come in `unit`s.
struct Levels {
  const uint8_t* numbers;  // [16]; null where a code is its own number, for tiers of more than 4 bits
  float centre, unit;
};

// Static, so that no version compiled for a newer processor is linked where it must not run.
static constexpr float level_of(const Levels& levels, int code) {
  return float(levels.numbers ? levels.numbers[code] : code) - levels.centre;
}

constexpr int kMostCurved = 4;  // bits

// CURVED of tiers.py for 2, 3 and 4 bits, and the codes themselves.
alignas(16) constexpr uint8_t kNumbers[4][16] = {
    {4, 23, 40, 59},
    {10, 18, 24, 29, 34, 39, 45, 53},
    {1, 9, 14, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45, 49, 54, 62},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
};
constexpr float kCurvedUnits[3] = {0.0433f, 0.1539f, 0.2590f};

/// The levels of a tier of `bits` in a ladder up to `top`.
static constexpr Levels levels_of(int bits, int top) {
  if (top <= kMostCurved) return {kNumbers[bits - 2], 31.5f, kCurvedUnits[bits - 2] * float(1 << (top - bits))};
  return {bits <= kMostCurved ? kNumbers[3] : nullptr, 0.5f * float((1 << bits) - 1), float(1 << (top - bits))};
}

/// Bytes of the activations of a token or of the codes of a row.
static constexpr int64_t codes_pitch(int64_t blocks) {
  return (blocks + kMostAtOnce - 1) / kMostAtOnce * kMostAtOnce * kBlock;
}

/// Where the code of a column of a block lies in a row: pieces of 16 columns, first those of all blocks
/// that are multiplied at once.
static constexpr int64_t place(int64_t at_once, int64_t block, int64_t column) {
  return ((block / at_once * (kBlock / 16) + column / 16) * at_once + block % at_once) * 16 + column % 16;
}

/// Of the memory that `product` works in: codes and step sizes of kScratchRows rows.
static constexpr int64_t scratch_bytes(int64_t blocks) {
  return kScratchRows * (codes_pitch(blocks) + (blocks + kGroup - 1) / kGroup * kGroup * int64_t(sizeof(float)));
}

static constexpr int64_t step_bytes(int64_t blocks) { return (blocks + 1) / 2; }

struct PlaneView {
  int width;
  const uint8_t* data;  // [rows, blocks, 8 * width]
};

/// One matrix at one tier, where it lies in the segments of a record. Nothing is aligned.
struct MatrixView {
  int64_t rows, cols, blocks;
  int bits;  // the tier
  int planes;
  PlaneView plane[kMaxPlanes];  // most significant first
  const uint8_t* steps;         // [rows, step_bytes(blocks)], block 2i in the low nibble of byte i
  const uint8_t* multiplier;    // bf16 [rows]
  Levels levels;
};

/// Tokens quantized to int8 by blocks, for the kernels that quantized them: see `place`. `pitch` is
/// `blocks` rounded up to whole groups; scales and sums are 0 there.
struct Activations {
  int64_t tokens, blocks, pitch;
  int8_t* codes;  // [tokens, codes_pitch(blocks)], in -127..127
  float* scales;  // [tokens, pitch], NaN for a block that is not finite
  float* sums;    // [tokens, pitch], scale times the sum of the codes of a block
};

/// One block of columns of a matrix while its codes are chosen; see descend.h. For each tier the
/// error is scale * level - weight, and its slope that error times the Hessian.
struct Descent {
  int tiers;
  int bits[kMaxTiers];
  float weights[kMaxTiers];  // of each tier's error in what is made least
  int64_t rows, cols;        // cols of the block, at most kBlock
  int64_t pitch;             // columns of the whole matrix
  bool last;                 // whether scales are fitted once more to the codes chosen
  const float* hessian;      // [cols, cols] of the block
  int64_t hessian_pitch;
  const float* slope;  // [tiers, rows, cols]
  const float* units;  // [tiers, rows] that a scale is kSteps times of; null for any scale
  float* scales;       // [tiers, rows]
  float* error;        // [tiers, rows, pitch], from the first column of the block
  uint8_t* codes;      // [rows, pitch], likewise
};

// Of what the KV cache keeps at 8 bits: columns that share a scale.
constexpr int64_t kCacheGroup = 32;
constexpr int64_t kCacheRows = 4;  // that are made floats at a time

/// Keys and values of one KV head as the cache keeps them, `pitch` bytes from one row to the next.
struct CacheRows {
  const uint8_t *keys, *values;
  int64_t pitch;
  int bits;
};

constexpr int64_t kMostTileRows = 32, kTileKeys = 64, kTileColumns = 8;

static constexpr int64_t tile_columns(int64_t n) { return (n + kTileColumns - 1) / kTileColumns * kTileColumns; }

/// Floats that `attend_tile` works in.
static constexpr int64_t tile_floats(int64_t n) {
  return 2 * tile_columns(n) * kMostTileRows + kTileKeys * (kMostTileRows + tile_columns(n));
}

/// Some rows of a prompt's attention for one KV head; row r is token r / group, head r % group.
struct PromptTile {
  int64_t first, rows, group;
  int64_t pitch;          // floats from one token to the next
  int64_t n;              // of a head
  int64_t start, window;  // position of token 0; positions that a token sees, 0 for all
  const float* queries;
  float* out;
  CacheRows cache;    // from position 0 on
  int64_t weighed;    // rows from this one on add to `received`
  float* received;    // of the positions from `start` on
};

enum class Activation { silu, gelu, gelu_tanh };

constexpr int kMostFittedBits = 5;

/// A matrix whose codes and scales are wanted to start a descent from; see fit.h.
struct Fit {
  int tiers;
  int bits[kMaxTiers];  // at most kMostFittedBits
  float weights[kMaxTiers];
  int64_t rows, cols;
  const float* weight;      // [rows, cols]
  const float* importance;  // [cols]: what the squared error of a column counts
  int starts;
  const float* start;  // [starts, rows, blocks]: scales of the highest tier to try
  float* scales;       // [tiers, rows, blocks]
  uint8_t* codes;      // [rows, cols]
};

struct Kernels {
  const char* name;
  int64_t at_once;    // blocks that are multiplied together: the order of codes, see `place`
  int64_t tile_rows;  // most rows of a PromptTile

  /// Quantizes one token, x [cols].
  void (*quantize)(const float* x, int64_t cols, int64_t token, const Activations& out);

  /// y[t * stride + r] = activations[t] . matrix[r] for all tokens and for r in [begin, end).
  /// scratch, aligned to 64 bytes, holds scratch_bytes(blocks). The value of an element does not depend
  /// on `begin`, `end` or the number of tokens.
  void (*product)(const MatrixView& matrix, const Activations& activations, int64_t begin, int64_t end,
                  float* y, int64_t stride, uint8_t* scratch);

  /// hidden[i] = act(hidden[i]) * ups[i].
  void (*activate)(Activation activation, int64_t count, const float* ups, float* hidden);

  /// Writes row `row` of the matrix as float, out [cols]; scratch as above.
  void (*dequantize)(const MatrixView& matrix, int64_t row, float* out, uint8_t* scratch);

  /// out = weight * x / rms(x), n floats each; out may be x.
  void (*norm)(const float* x, const float* weight, int64_t n, float eps, float* out);

  /// out[r] = rows[r] . x for r in [begin, end); rows [.., n].
  void (*dots)(const float* rows, int64_t n, int64_t begin, int64_t end, const float* x, float* out);

  /// x = exp(x - max(x)), n floats; returns their sum.
  float (*exponentials)(float* x, int64_t n);

  /// Writes n floats as a row of the cache, as kv_cache.py defines them.
  void (*pack_row)(const float* x, int64_t n, int bits, uint8_t* row);

  /// Attention of queries [heads, n] of one KV head over `count` rows: out [heads, n]. Scores hold
  /// heads * count floats, rows kCacheRows * n.
  void (*attend)(const float* queries, int64_t heads, const CacheRows& cache, int64_t count, int64_t n, float* scores,
                 float* rows, float* out);

  /// Rows [first, first + rows) of a prompt; scratch holds tile_floats(n), aligned to 64 bytes.
  void (*attend_tile)(const PromptTile& tile, float* scratch);

  /// Improves scales and codes of rows [row, row + rows) and brings the error up to date.
  void (*descend)(const Descent& block, int64_t row, int64_t rows);

  /// Codes and scales of rows [row, row + rows).
  void (*fit)(const Fit& fit, int64_t row, int64_t rows);
};

}  // namespace dymoe

// What the kernels of every instruction set read and write, and the table that each provides.
#pragma once

#include <cstdint>

namespace dymoe {

constexpr int64_t kBlock = 64;      // columns that share a step
constexpr int64_t kGroup = 16;      // blocks whose scales are combined at once
constexpr int64_t kScratchRows = 4; // rows of codes that the scratch of `product` holds
constexpr int kMaxPlanes = 8;

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
  const uint8_t* steps;         // [rows, blocks]
  const uint8_t* multiplier;    // bf16 [rows]
  float step_unit;              // 2^(top tier - tier)
};

/// Tokens quantized to int8 by blocks. `pitch` is `blocks` rounded up to whole groups;
/// scales and sums are 0 there.
struct Activations {
  int64_t tokens, blocks, pitch;
  int8_t* codes;  // [tokens, blocks * 64], in -127..127
  float* scales;  // [tokens, pitch], NaN for a block that is not finite
  float* sums;    // [tokens, pitch], sum of the codes of a block
};

struct Kernels {
  const char* name;

  /// Quantizes one token, x [cols].
  void (*quantize)(const float* x, int64_t cols, int64_t token, const Activations& out);

  /// y[t * stride + r] = activations[t] . matrix[r] for all tokens and for r in [begin, end).
  /// scratch holds kScratchRows * blocks * 64 bytes. The value of an element does not depend
  /// on `begin`, `end` or the number of tokens.
  void (*product)(const MatrixView& matrix, const Activations& activations, int64_t begin, int64_t end,
                  float* y, int64_t stride, uint8_t* scratch);

  /// Writes row `row` of the matrix as float, out [cols]; scratch as above.
  void (*dequantize)(const MatrixView& matrix, int64_t row, float* out, uint8_t* scratch);
};

}  // namespace dymoe

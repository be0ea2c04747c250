// Coordinate descent on one block of columns of a matrix with nested tiers, written once for
// every instruction set: sixteen rows at a time, one to a lane of a vector that the compiler maps
// to what the processor has. Lanes never meet, so results do not depend on the instruction set.
//
// Everything is in an unnamed namespace, as in product.h.
#pragma once

#include <cstring>

#include "kernels.h"

namespace dymoe {
namespace {

constexpr int kLanes = 16;
constexpr float kTiny = 1e-30f;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

/// Sixteen rows of a block, columns outermost. Lanes without a row are zero.
struct DescentTile {
  Floats slope[kMaxTiers][kBlock];
  Floats level[kMaxTiers][kBlock];  // of the current codes
  Floats start[kMaxTiers][kBlock];  // scale * level when the tile was loaded
  Floats scale[kMaxTiers];
  Floats unit[kMaxTiers];
  uint8_t codes[kBlock][kLanes];
};

float level_of(int code, int bits) { return float(code) - 0.5f * float((1 << bits) - 1); }

void load_tile(const Descent& d, int64_t row, int64_t rows, DescentTile& tile) {
  const int top = d.bits[d.tiers - 1];
  std::memset(tile.codes, 0, sizeof tile.codes);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < d.cols; ++j) tile.codes[j][r] = d.codes[(row + r) * d.pitch + j];
  for (int t = 0; t < d.tiers; ++t) {
    float levels[1 << 8];
    for (int c = 0; c < 1 << top; ++c) levels[c] = level_of(c >> (top - d.bits[t]), d.bits[t]);
    tile.scale[t] = tile.unit[t] = Floats{};
    for (int64_t r = 0; r < rows; ++r) {
      tile.scale[t][r] = d.scales[t * d.rows + row + r];
      if (d.units) tile.unit[t][r] = d.units[t * d.rows + row + r];
    }
    for (int64_t j = 0; j < d.cols; ++j) {
      const float* slope = d.slope + (t * d.rows + row) * d.cols + j;
      float lanes[2][kLanes] = {};
      for (int64_t r = 0; r < rows; ++r) {
        lanes[0][r] = slope[r * d.cols];
        lanes[1][r] = levels[tile.codes[j][r]];
      }
      std::memcpy(&tile.slope[t][j], lanes[0], sizeof lanes[0]);
      std::memcpy(&tile.level[t][j], lanes[1], sizeof lanes[1]);
      tile.start[t][j] = tile.scale[t] * tile.level[t][j];
    }
  }
}

void store_tile(const Descent& d, int64_t row, int64_t rows, const DescentTile& tile) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < d.cols; ++j) d.codes[(row + r) * d.pitch + j] = tile.codes[j][r];
  for (int t = 0; t < d.tiers; ++t) {
    for (int64_t r = 0; r < rows; ++r) d.scales[t * d.rows + row + r] = tile.scale[t][r];
    for (int64_t j = 0; j < d.cols; ++j) {
      float moved[kLanes];
      const Floats change = tile.scale[t] * tile.level[t][j] - tile.start[t][j];
      std::memcpy(moved, &change, sizeof moved);
      float* error = d.error + (t * d.rows + row) * d.pitch + j;
      for (int64_t r = 0; r < rows; ++r) error[r * d.pitch] += moved[r];
    }
  }
}

/// The nearest scale that can be stored: `unit` times one of kSteps.
Floats snapped(const Floats& unit, const Floats& scale) {
  Floats best = unit * kSteps[1];
  for (int k = 2; k < 16; ++k) {
    const Floats next = unit * kSteps[k];
    best = scale - best > next - scale ? next : best;
  }
  return best;
}

/// Moves each row's scale of tier t to where the error is least.
void fit_scale(const Descent& d, int t, DescentTile& tile) {
  Floats curve[kBlock];  // H . level
  Floats along = {}, square = {};
  for (int64_t k = 0; k < d.cols; ++k) {
    const float* h = d.hessian + k * d.hessian_pitch;
    Floats sum = {};
    for (int64_t j = 0; j < d.cols; ++j) sum += h[j] * tile.level[t][j];
    curve[k] = sum;
    along += tile.slope[t][k] * tile.level[t][k];
    square += sum * tile.level[t][k];
  }
  const Floats zero = {}, tiny = zero + kTiny;
  const Floats old = tile.scale[t], moved = old - along / (square > tiny ? square : tiny);
  // A scale that would change sign stays.
  Floats wanted = moved > zero ? (square > tiny ? moved : old) : old;
  if (d.units) wanted = snapped(tile.unit[t], wanted);
  // A block of zeros keeps its 0.
  wanted = old == zero ? zero : wanted;
  for (int64_t k = 0; k < d.cols; ++k) tile.slope[t][k] += (wanted - old) * curve[k];
  tile.scale[t] = wanted;
}

/// Chooses the code of column j that leaves the least error over all tiers, given all other codes.
void choose_codes(const Descent& d, int64_t j, DescentTile& tile) {
  const float h = d.hessian[j * d.hessian_pitch + j];
  const float inverse = h > kTiny ? 1.0f / h : 0.0f;
  Floats cost[2][1 << 8];
  int from = 0;
  for (int t = 0; t < d.tiers; ++t) {
    const Floats scale = tile.scale[t], target = scale * tile.level[t][j] - tile.slope[t][j] * inverse;
    const int more = t ? d.bits[t] - d.bits[t - 1] : 0;
    for (int c = 0; c < 1 << d.bits[t]; ++c) {
      const Floats error = scale * level_of(c, d.bits[t]) - target;
      const Floats own = d.weights[t] * error * error;
      cost[1 - from][c] = t ? cost[from][c >> more] + own : own;
    }
    from = 1 - from;
  }
  Floats least = cost[from][0];
  Ints best = {};
  const int top = d.bits[d.tiers - 1];
  for (int c = 1; c < 1 << top; ++c) {
    const Ints better = cost[from][c] < least;
    best = better ? Ints{} + c : best;
    least = better ? cost[from][c] : least;
  }
  for (int i = 0; i < kLanes; ++i) tile.codes[j][i] = uint8_t(best[i]);
  for (int t = 0; t < d.tiers; ++t) {
    const Floats code = __builtin_convertvector(best >> (top - d.bits[t]), Floats);
    const Floats level = code - 0.5f * float((1 << d.bits[t]) - 1);
    const Floats moved = tile.scale[t] * (level - tile.level[t][j]);
    tile.level[t][j] = level;
    // Columns before j matter only to the scales.
    const float* across = d.hessian + j * d.hessian_pitch;
    for (int64_t k = d.last ? 0 : j + 1; k < d.cols; ++k) tile.slope[t][k] += across[k] * moved;
  }
}

/// One visit of rows [row, row + rows), at most kLanes: scales, codes, and at last scales again.
void descend(const Descent& d, int64_t row, int64_t rows) {
  DescentTile tile;
  load_tile(d, row, rows, tile);
  for (int t = 0; t < d.tiers; ++t) fit_scale(d, t, tile);
  for (int64_t j = 0; j < d.cols; ++j) choose_codes(d, j, tile);
  if (d.last)
    for (int t = 0; t < d.tiers; ++t) fit_scale(d, t, tile);
  store_tile(d, row, rows, tile);
}

}  // namespace
}  // namespace dymoe

// Coordinate descent on one block of columns of a matrix with nested tiers, written once for every instruction set.
// Each row has a lane of its own in vectors as wide as the processor's. Lanes never mix, so results do not depend on
// the instruction set.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cstring>

#include "kernels.h"
#include "templates/lanes.h"

namespace dymoe {
namespace {

// Columns whose changes are applied together to the slopes of the other columns.
constexpr int64_t kTogether = 8;
// Independent sums, so that additions do not wait for one another.
constexpr int64_t kSums = 4;
// A curvature up to this counts as 0.
constexpr float kTiny = 1e-30f;

/// At most kLanes rows of a block, one in each lane; columns are outermost. Lanes without a row are zero.
struct DescentTile {
  Floats slope[kMaxTiers][kBlock];  // error times Hessian
  Floats level[kMaxTiers][kBlock];  // of the current codes
  Floats start[kMaxTiers][kBlock];  // scale * level when the tile was loaded
  Floats scale[kMaxTiers];
  Floats unit[kMaxTiers];           // 0 if any scale will do
  Ints codes[kBlock];               // of the highest tier
  float levels[kMaxTiers][1 << 8];  // of each code of each tier
};

/// Returns the lanes of vectors as single floats.
float* lanes_of(Floats* vectors) { return reinterpret_cast<float*>(vectors); }

/// Loads rows [row, row + rows), at most kLanes.
void load_tile(const Descent& d, int64_t row, int64_t rows, DescentTile& tile) {
  const int top = d.bits[d.tiers - 1];
  std::memset(static_cast<void*>(tile.slope), 0, sizeof tile.slope[0] * d.tiers);
  std::memset(static_cast<void*>(tile.level), 0, sizeof tile.level[0] * d.tiers);
  std::memset(static_cast<void*>(tile.codes), 0, sizeof tile.codes);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < d.cols; ++j) tile.codes[j][r] = d.codes[(row + r) * d.pitch + j];
  for (int t = 0; t < d.tiers; ++t) {
    const Levels levels_of_tier = d.whole ? whole_numbers(d.bits[t]) : levels_of(d.bits[t], top);
    for (int c = 0; c < 1 << d.bits[t]; ++c) tile.levels[t][c] = level_of(levels_of_tier, c);
    tile.scale[t] = tile.unit[t] = Floats{};
    float *slopes = lanes_of(tile.slope[t]), *levels = lanes_of(tile.level[t]);
    for (int64_t r = 0; r < rows; ++r) {
      tile.scale[t][r] = d.scales[t * d.rows + row + r];
      if (d.units) tile.unit[t][r] = d.units[t * d.rows + row + r];
      const float* slope = d.slope + (t * d.rows + row + r) * d.cols;
      const uint8_t* codes = d.codes + (row + r) * d.pitch;
      for (int64_t j = 0; j < d.cols; ++j) {
        slopes[j * kLanes + r] = slope[j];
        levels[j * kLanes + r] = tile.levels[t][codes[j] >> (top - d.bits[t])];
      }
    }
    for (int64_t j = 0; j < d.cols; ++j) tile.start[t][j] = tile.scale[t] * tile.level[t][j];
  }
}

/// Stores codes and scales, and adds the change of scale * level to the error.
void store_tile(const Descent& d, int64_t row, int64_t rows, DescentTile& tile) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < d.cols; ++j) d.codes[(row + r) * d.pitch + j] = uint8_t(tile.codes[j][r]);
  for (int t = 0; t < d.tiers; ++t) {
    for (int64_t j = 0; j < d.cols; ++j)
      tile.start[t][j] = tile.scale[t] * tile.level[t][j] - tile.start[t][j];  // becomes the change
    const float* moved = lanes_of(tile.start[t]);
    for (int64_t r = 0; r < rows; ++r) {
      d.scales[t * d.rows + row + r] = tile.scale[t][r];
      float* error = d.error + (t * d.rows + row + r) * d.pitch;
      for (int64_t j = 0; j < d.cols; ++j) error[j] += moved[j * kLanes + r];
    }
  }
}

/// Returns the nearest scale that can be stored: `unit` times one of kScaleSizes, except 0.
Floats snapped(const Floats& unit, const Floats& scale) {
  Floats best = unit * kScaleSizes[1];
  for (int k = 2; k < 16; ++k) {
    const Floats next = unit * kScaleSizes[k];
    best = scale - best > next - scale ? next : best;
  }
  return best;
}

/// Computes curve[k] = H[k] . level for `count` columns k from `first` on.
template <int64_t count>
void curve_of(const Descent& d, const Floats* level, int64_t first, Floats* curve) {
  const float* h = d.hessian + first * d.hessian_pitch;
  Floats sums[count] = {};
  for (int64_t j = 0; j < d.cols; ++j)
    for (int64_t i = 0; i < count; ++i) sums[i] += h[i * d.hessian_pitch + j] * level[j];
  for (int64_t i = 0; i < count; ++i) curve[first + i] = sums[i];
}

/// Moves each row's scale of tier t to where the error is least.
void fit_scale(const Descent& d, int t, DescentTile& tile) {
  Floats curve[kBlock];  // H . level
  int64_t first = 0;
  for (; first + kSums <= d.cols; first += kSums) curve_of<kSums>(d, tile.level[t], first, curve);
  for (; first < d.cols; ++first) curve_of<1>(d, tile.level[t], first, curve);
  Floats along = {}, square = {};
  for (int64_t k = 0; k < d.cols; ++k) {
    along += tile.slope[t][k] * tile.level[t][k];
    square += curve[k] * tile.level[t][k];
  }
  const Floats zero = {}, tiny = zero + kTiny;
  const Floats old = tile.scale[t], moved = old - along / (square > tiny ? square : tiny);
  // A scale that would not stay positive stays as it is.
  Floats wanted = moved > zero ? (square > tiny ? moved : old) : old;
  if (d.units) wanted = snapped(tile.unit[t], wanted);
  // A block of zeros keeps its scale of 0.
  wanted = old == zero ? zero : wanted;
  for (int64_t k = 0; k < d.cols; ++k) tile.slope[t][k] += (wanted - old) * curve[k];
  tile.scale[t] = wanted;
}

/// Returns the code of column j that gives the least error over all tiers, given all other codes.
Ints best_code(const Descent& d, int64_t j, const DescentTile& tile) {
  const float h = d.hessian[j * d.hessian_pitch + j];
  const float inverse = h > kTiny ? 1.0f / h : 0.0f;
  Floats cost[2][1 << 8];
  int from = 0;
  for (int t = 0; t < d.tiers; ++t) {
    const Floats scale = tile.scale[t], target = scale * tile.level[t][j] - tile.slope[t][j] * inverse;
    const int more = t ? d.bits[t] - d.bits[t - 1] : 0;
    for (int c = 0; c < 1 << d.bits[t]; ++c) {
      const Floats error = scale * tile.levels[t][c] - target;
      const Floats own = d.weights[t] * error * error;
      cost[1 - from][c] = t ? cost[from][c >> more] + own : own;
    }
    from = 1 - from;
  }
  Floats least = cost[from][0];
  Ints best = {};
  const int codes = 1 << d.bits[d.tiers - 1];
  for (int c = 1; c < codes; ++c) {
    const Ints better = cost[from][c] < least;
    best = better ? Ints{} + c : best;
    least = better ? cost[from][c] : least;
  }
  return best;
}

/// Applies the changes of columns [first, stop) to the slopes of columns [begin, end). moved[0] belongs to column
/// `first`.
void move_slopes(const Descent& d, int64_t first, int64_t stop, const Floats* moved, int64_t begin, int64_t end,
                 Floats* slopes) {
  for (int64_t k = begin; k < end; ++k) {
    Floats slope = slopes[k];
    for (int64_t j = first; j < stop; ++j) slope += d.hessian[j * d.hessian_pitch + k] * moved[j - first];
    slopes[k] = slope;
  }
}

/// Gives columns [first, stop), at most kTogether, their best codes, one after another.
void choose_codes(const Descent& d, int64_t first, int64_t stop, DescentTile& tile) {
  const int top = d.bits[d.tiers - 1];
  Floats moved[kMaxTiers][kTogether];
  for (int64_t j = first; j < stop; ++j) {
    const Ints best = tile.codes[j] = best_code(d, j, tile);
    for (int t = 0; t < d.tiers; ++t) {
      Floats level;
      for (int r = 0; r < kLanes; ++r) level[r] = tile.levels[t][best[r] >> (top - d.bits[t])];
      moved[t][j - first] = tile.scale[t] * (level - tile.level[t][j]);
      tile.level[t][j] = level;
      move_slopes(d, j, j + 1, moved[t] + (j - first), d.last ? first : j + 1, stop, tile.slope[t]);
    }
  }
  for (int t = 0; t < d.tiers; ++t) {
    // Slopes of earlier columns matter only to the scales, which the last visit fits once more.
    if (d.last) move_slopes(d, first, stop, moved[t], 0, first, tile.slope[t]);
    move_slopes(d, first, stop, moved[t], stop, d.cols, tile.slope[t]);
  }
}

/// Visits rows [row, row + rows), at most kLanes: fits scales, chooses codes, and in the last visit fits scales again.
void visit(const Descent& d, int64_t row, int64_t rows) {
  DescentTile tile;
  load_tile(d, row, rows, tile);
  for (int t = 0; t < d.tiers; ++t) fit_scale(d, t, tile);
  for (int64_t j = 0; j < d.cols; j += kTogether)
    choose_codes(d, j, j + kTogether < d.cols ? j + kTogether : d.cols, tile);
  if (d.last)
    for (int t = 0; t < d.tiers; ++t) fit_scale(d, t, tile);
  store_tile(d, row, rows, tile);
}

/// Visits rows [row, row + rows).
void visit_rows(const Descent& d, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kLanes) visit(d, row + r, rows - r < kLanes ? rows - r : kLanes);
}

}  // namespace
}  // namespace dymoe

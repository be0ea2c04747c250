// The codes and scales that coordinate descent starts from. As in descend.h, each row has a lane of its own, and
// results do not depend on the instruction set.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include "descent/descend.h"

namespace dymoe {
namespace {

constexpr int kMaxFitted = 1 << kMaxFittedBits;  // most codes of the highest tier

/// Where each code of the highest tier begins, and by how much it raises the level of each tier.
struct Ramps {
  float bounds[kMaxFitted];            // bounds[c] is the least value of code c, from 1 on
  float steps[kMaxTiers][kMaxFitted];  // [tier][code]: rise from the code before; at code 0 the level itself
};

/// Returns the ramps for the tiers of a fit.
Ramps ramps_of(const Fit& fit) {
  Ramps ramps{};
  const int top = fit.bits[fit.tiers - 1];
  const Levels levels = levels_of(top, top);
  for (int c = 1; c < 1 << top; ++c) ramps.bounds[c] = 0.5f * (level_of(levels, c - 1) + level_of(levels, c));
  for (int t = 0; t < fit.tiers; ++t) {
    const Levels mine = levels_of(fit.bits[t], top);
    const int more = top - fit.bits[t];
    ramps.steps[t][0] = level_of(mine, 0);
    for (int c = 1; c < 1 << top; ++c) ramps.steps[t][c] = level_of(mine, c >> more) - level_of(mine, (c - 1) >> more);
  }
  return ramps;
}

/// Returns 1 / scale, or 0 where the scale is not positive.
Floats inverse_of(const Floats& scale) {
  const Floats zero = {};
  return scale > zero ? 1.0f / scale : zero;
}

/// The least-squares scales of all tiers, for the codes that are nearest at one scale of the highest tier.
struct Trial {
  Floats loss;  // squared error, weighted by column and tier
  Floats scale[kMaxTiers];
};

/// Tries the scale `start` of the highest tier on a block of `cols` columns.
Trial try_scale(const Fit& fit, const Ramps& ramps, const Floats* weight, const float* importance, int64_t cols,
                const Floats& start) {
  const int codes = 1 << fit.bits[fit.tiers - 1];
  const Floats inverse = inverse_of(start), zero = {};
  Floats energy = {}, across[kMaxTiers] = {}, square[kMaxTiers] = {};
  for (int64_t j = 0; j < cols; ++j) {
    const Floats relative = weight[j] * inverse, weighted = weight[j] * importance[j];
    energy += weighted * weight[j];
    for (int t = 0; t < fit.tiers; ++t) {
      const int width = 1 << (fit.bits[fit.tiers - 1] - fit.bits[t]);
      Floats level = zero + ramps.steps[t][0];
      for (int c = width; c < codes; c += width) level += relative >= ramps.bounds[c] ? zero + ramps.steps[t][c] : zero;
      across[t] += weighted * level;
      square[t] += importance[j] * level * level;
    }
  }
  Trial trial{};
  for (int t = 0; t < fit.tiers; ++t) {
    const Floats scale = square[t] > zero ? across[t] / square[t] : zero;
    trial.scale[t] = scale > zero ? scale : zero;
    trial.loss +=
        fit.weights[t] * (energy - 2.0f * trial.scale[t] * across[t] + trial.scale[t] * trial.scale[t] * square[t]);
  }
  return trial;
}

/// Fits one block of rows [row, row + rows), at most kLanes.
void fit_block(const Fit& fit, const Ramps& ramps, int64_t row, int64_t rows, int64_t block) {
  const int64_t first = block * kBlock, blocks = (fit.cols + kBlock - 1) / kBlock;
  const int64_t cols = fit.cols - first < kBlock ? fit.cols - first : kBlock;
  Floats weight[kBlock] = {};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < cols; ++j) weight[j][r] = fit.weight[(row + r) * fit.cols + first + j];
  Trial best{};
  for (int s = 0; s < fit.starts; ++s) {
    Floats start = {};
    for (int64_t r = 0; r < rows; ++r) start[r] = fit.start[(s * fit.rows + row + r) * blocks + block];
    const Trial trial = try_scale(fit, ramps, weight, fit.importance + first, cols, start);
    const Ints better = s ? trial.loss < best.loss : Ints{} - 1;
    best.loss = better ? trial.loss : best.loss;
    for (int t = 0; t < fit.tiers; ++t) best.scale[t] = better ? trial.scale[t] : best.scale[t];
  }
  for (int t = 0; t < fit.tiers; ++t)
    for (int64_t r = 0; r < rows; ++r) fit.scales[(t * fit.rows + row + r) * blocks + block] = best.scale[t][r];
  const Floats inverse = inverse_of(best.scale[fit.tiers - 1]);
  for (int64_t j = 0; j < cols; ++j) {
    const Floats relative = weight[j] * inverse;
    Ints code = {};
    for (int c = 1; c < 1 << fit.bits[fit.tiers - 1]; ++c) code -= relative >= ramps.bounds[c];
    for (int64_t r = 0; r < rows; ++r) fit.codes[(row + r) * fit.cols + first + j] = uint8_t(code[r]);
  }
}

/// See Kernels::fit.
void fit_rows(const Fit& fit, int64_t row, int64_t rows) {
  const Ramps ramps = ramps_of(fit);
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t block = 0; block * kBlock < fit.cols; ++block)
      fit_block(fit, ramps, row + r, rows - r < kLanes ? rows - r : kLanes, block);
}

}  // namespace
}  // namespace dymoe

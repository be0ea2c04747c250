// The tables of the trellis grid; tiers.py says what they mean.
#pragma once

#include <cstdint>

namespace dymoe {

constexpr int64_t kTrellisRows = 128;  // of a group
constexpr int64_t kTrellisRing = 16;   // fewest symbols of a column that form a ring
constexpr int kMaxTrellis = 6;         // most bits
constexpr int kMaxTrellisPlanes = kMaxTrellis - 1;

alignas(16) constexpr uint8_t kTrellisNumbers[5][16] = {
    {22, 35, 14, 41, 0, 18, 35, 61, 34, 45, 52, 27, 44, 27, 27, 11},
    {24, 35, 18, 40, 6, 21, 34, 57, 34, 43, 49, 28, 42, 28, 28, 15},
    {25, 35, 19, 40, 8, 22, 35, 55, 34, 43, 48, 29, 42, 29, 29, 17},
    {97, 128, 79, 142, 45, 88, 126, 190, 125, 151, 168, 108, 149, 108, 108, 70},
    {97, 125, 81, 137, 51, 89, 123, 180, 122, 146, 161, 107, 144, 107, 107, 73},
};
// [tier][plane][row of a pair][entry]
alignas(16) constexpr int8_t kTrellisSteps[5][4][2][16] = {
    {},
    {{{1, 5, -2, -6, -4, 0, 1, 0, -3, -1, 2, 4, 2, -3, -4, -2},
      {4, -2, -1, -1, 2, -6, 2, -2, -3, 0, -4, 2, -1, 5, -4, 1}}},
    {{{2, 5, -1, -5, -3, 1, 1, 1, -2, 0, 2, 4, 2, -2, -3, -2},
      {5, -1, -1, -1, 2, -5, 2, -1, -2, 1, -4, 2, -1, 5, -4, 1}},
     {{2, -1, -2, 0, -2, 1, 0, 1, 0, 2, 0, -1, 0, -1, -3, 3}, {0, -3, 2, 1, 1, 2, -1, -1, 3, -2, 1, -1, -1, 1, -1, 1}}},
    {{{6, 16, -3, -17, -10, 2, 4, 3, -7, -1, 7, 13, 7, -5, -9, -5},
      {14, -4, -2, -2, 6, -16, 7, -4, -7, 2, -11, 6, -3, 15, -12, 4}},
     {{7, -3, -7, 0, -5, 4, 0, 3, 1, 5, 2, -4, 0, -2, -9, 10},
      {-1, -9, 5, 3, 1, 4, -4, -3, 9, -8, 2, -3, -3, 1, -3, 2}},
     {{0, 3, -2, 4, 0, 2, -3, -3, -5, -2, 4, 1, 0, -2, 0, 0}, {-1, -19, 3, 3, 3, 1, -3, 0, 3, 0, -2, 0, -4, 3, 0, 6}}},
    {{{5, 14, -3, -15, -9, 1, 3, 2, -7, -1, 6, 11, 6, -5, -9, -5},
      {13, -3, -2, -1, 6, -14, 6, -3, -6, 2, -9, 6, -2, 13, -10, 4}},
     {{6, -2, -6, 0, -4, 4, 0, 3, 1, 5, 2, -3, 1, -1, -7, 9}, {-1, -8, 5, 3, 1, 4, -4, -3, 8, -7, 2, -2, -3, 1, -3, 2}},
     {{1, 3, -1, 4, 1, 3, -2, -2, -4, -1, 4, 1, 1, -1, 1, 1}, {-1, -19, 3, 3, 3, 1, -2, 1, 3, 0, -1, 0, -3, 3, 1, 6}},
     {{-1, 1, -2, 15, -9, 1, -2, -1, 0, -3, -1, 0, 0, -1, 0, -1},
      {0, -1, -2, 0, -2, 1, 0, -2, -1, -1, 11, 0, -3, -1, -1, 1}}},
};
constexpr float kTrellisCentres[5] = {31.0f, 31.0f, 32.0f, 118.0f, 116.0f};
constexpr float kTrellisUnits[5] = {0.07144f, 0.08563f, 0.09121f, 0.02946f, 0.03289f};

/// Returns what an entry of a plane's table adds to the level of tier `bits`; `row` is that of a pair.
static constexpr float trellis_level(int bits, int plane, int row, int entry) {
  return plane ? float(kTrellisSteps[bits - 2][plane - 1][row][entry])
               : float(kTrellisNumbers[bits - 2][entry]) - kTrellisCentres[bits - 2];
}

}  // namespace dymoe

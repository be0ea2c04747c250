// Coordinate descent on one block of columns of a matrix on the trellis grid; see tiers.py for what its codes mean.
//
// The number of a weight depends on the codes of the rows above it. So the codes of a column are chosen for all rows of
// a group at once, plane after plane, each by the algorithm of Viterbi (1967). Slopes and scales are those of
// descend.h.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "descent/descend.h"
#include "descent/paths.h"
#include "kernels.h"
#include "templates/sources.h"
#include "trellis_tables.h"

namespace dymoe {
namespace {

constexpr int kEntryParts = kEntries / kLanes;  // vectors of a value for each entry
constexpr int kSlices = kTrellisRows / kLanes;  // vectors of a value for each row of a group
// How much the error that a plane leaves at a higher tier counts, for each plane that is still to come. On the
// reference model 0.15 had 7% less KL at 2 bits and 9% more at 4; 1 had 15% more at 2 bits and 9% more at 3.
constexpr float kAhead = 0.35f;
// What a symbol costs if its errors are as large as usual: enough that rounding matters little. Rows with smaller and
// larger weights than the median row of their group have less and more of it, but within these shares.
constexpr float kUsualCost = 16.0f, kLeastShare = 0.25f, kMostShare = 4.0f;
// Rows whose usual squared error is no larger are not weighed: they would divide by almost nothing.
constexpr float kTooSmall = 1e-36f;
// Costs above kFarCost rise by kFarRise only, up to kMaxCost, so that of the entries far from an outlier the nearest is
// still the best.
constexpr float kFarCost = 896.0f, kFarRise = 1.0f / 32.0f;
// Usual squared error of a tier, relative to a row's mean square, of 2 to 6 bits.
constexpr float kUsualErrors[kMaxTrellis - 1] = {0.08f, 0.024f, 0.0075f, 0.0022f, 0.0006f};

/// A value for each entry, at place 4 * own + above: so the four values of `above` are neighbours.
struct Entries {
  Floats part[kEntryParts];
};

/// Returns the float at row `row` of a value in slices.
float at_row(const Floats* slices, int row) { return reinterpret_cast<const float*>(slices)[row]; }

/// What the entries of a plane cost in each row, as far as it does not depend on the column. Beside what is spared, an
/// entry whose number at tier t is n costs plain + the sum over t of slope[t] * n, where slope[t] = lean[t] * rest[t].
struct Weighing {
  Floats square[kMaxTiers][kSlices];  // weight * scale^2
  Floats lean[kMaxTiers][kSlices];    // -2 * weight * scale
  Entries plain[kTrellisRows];        // of each row, or of each pair of rows
};

/// The rows of a group, or the last rows of a matrix, kLanes in each slice. Scales and slopes of rows that are missing
/// are zero, so that their levels do not matter.
struct TrellisGroup {
  DescentTile slices[kSlices];
  int rows;
  int planes;                                   // of the highest tier
  uint8_t codes[kBlock][kTrellisRows];          // [column][row], of the highest tier
  Floats inverse[kMaxTiers][kSlices];           // 1 / scale
  Floats targets[kMaxTiers][kSlices];           // of the column whose codes are chosen: what the value should be
  Floats slopes[kMaxTiers][kSlices];            // of that column and one plane
  Floats spared[kSlices];                       // what no entry of the plane can save
  Floats numbers[kMaxTiers][kSlices];           // of that column, by the planes that are chosen so far
  Floats kept[kMaxTiers][kSlices];              // those of the best codes so far
  Floats moved[kMaxTiers][kSlices][kTogether];  // changes of values, of columns that are applied together
  // [tier][plane][row of a pair]: what an entry adds to the level, in the order of Entries
  alignas(64) float added[kMaxTiers][kMaxTrellisPlanes][2][kEntries];
  float widest[kMaxTiers][kMaxTrellisPlanes];  // the largest magnitude of those
  Weighing weighing[2][kMaxTrellisPlanes];     // with planes to come, and with all others known
  Costs costs[kTrellisRows];
  Step steps[kTrellisRows];
};

/// The symbols of each plane of a column: of each row, or from the second plane on of each pair of rows.
struct Chosen {
  uint8_t symbols[kMaxTrellisPlanes][kTrellisRows];
};

/// Returns in places [kTrellisRows], for each row, the index in added[tier][plane] of the number that these symbols
/// give it. Places of rows that are missing mean nothing.
void places_of(const uint8_t* symbols, int plane, int rows, int32_t* places) {
  const int count = plane ? (rows + 1) / 2 : rows, ring = ring_of(count);
  uint8_t entries[kTrellisRows];
  for (int i = 0; i < 3; ++i) {
    const int above =
        ring ? (i > 0 ? symbols[i - 1] : symbols[ring - 1]) ^ symbols[ring + i - 3] : (i > 0 ? symbols[i - 1] : 0);
    entries[i] = uint8_t(4 * symbols[i] + above);
  }
  for (int i = 3; i < kTrellisRows; ++i) entries[i] = uint8_t(4 * symbols[i] + (symbols[i - 1] ^ symbols[i - 3]));
  if (plane)
    for (int i = 0; i < kTrellisRows / 2; ++i) places[2 * i] = entries[i], places[2 * i + 1] = entries[i] + kEntries;
  else
    for (int i = 0; i < kTrellisRows; ++i) places[i] = entries[i];
}

/// Returns the numbers at `places` of a table.
DYMOE_INLINE Floats looked_up(const float (&table)[2][kEntries], const int32_t* places) {
#if defined(__AVX2__) && !defined(__clang__)
  Ints wide;
  std::memcpy(&wide, places, sizeof wide);
  const Floats* parts = reinterpret_cast<const Floats*>(table);
  if constexpr (kLanes == 16) return __builtin_shuffle(parts[0], parts[1], wide);
  const Floats even = __builtin_shuffle(parts[0], parts[1], wide), odd = __builtin_shuffle(parts[2], parts[3], wide);
  return wide < kEntries ? even : odd;
#else
  Floats numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = table[places[i] / kEntries][places[i] % kEntries];
  return numbers;
#endif
}

/// Adds to numbers what the symbols of a plane stand for, `sign` times.
void add_numbers(const Descent& d, int plane, float sign, const uint8_t* symbols, TrellisGroup& group) {
  alignas(64) int32_t places[kTrellisRows];
  places_of(symbols, plane, group.rows, places);
  for (int t = 0; t < d.tiers; ++t)
    if (d.bits[t] >= plane + 2)
      for (int s = 0; s < kSlices; ++s)
        group.numbers[t][s] += sign * looked_up(group.added[t][plane], places + s * kLanes);
}

/// Returns the symbols of column j by its codes.
void recall(int64_t j, const TrellisGroup& group, Chosen& chosen) {
  const uint8_t* codes = group.codes[j];
  chosen = Chosen{};
  for (int plane = 0, shift = group.planes - 1; plane < group.planes; ++plane, --shift) {
    uint8_t* symbols = chosen.symbols[plane];
    if (plane == 0)
      for (int r = 0; r < kTrellisRows; ++r) symbols[r] = uint8_t((codes[r] >> shift) & 3);
    else
      for (int i = 0; i < kTrellisRows / 2; ++i)
        symbols[i] = uint8_t(((codes[2 * i] >> shift) & 1) | ((codes[2 * i + 1] >> shift) & 1) << 1);
  }
}

/// Sets the codes of column j by the symbols of all planes.
void set_codes(const Chosen& chosen, int64_t j, TrellisGroup& group) {
  uint8_t* codes = group.codes[j];
  for (int r = 0; r < kTrellisRows; ++r) codes[r] = chosen.symbols[0][r];
  for (int plane = 1; plane < group.planes; ++plane) {
    const uint8_t* symbols = chosen.symbols[plane];
    for (int i = 0; i < kTrellisRows / 2; ++i) {
      codes[2 * i] = uint8_t(2 * codes[2 * i] | (symbols[i] & 1));
      codes[2 * i + 1] = uint8_t(2 * codes[2 * i + 1] | symbols[i] >> 1);
    }
  }
}

/// Sets the numbers of the column whose codes are chosen to what all its symbols stand for.
void set_numbers(const Descent& d, const Chosen& chosen, TrellisGroup& group) {
  std::memset(static_cast<void*>(group.numbers), 0, d.tiers * sizeof *group.numbers);
  for (int plane = 0; plane < group.planes; ++plane) add_numbers(d, plane, 1.0f, chosen.symbols[plane], group);
}

/// Reads the codes of all columns, and the levels of all tiers from them.
void read_codes(const Descent& d, int64_t row, TrellisGroup& group) {
  for (int r = 0; r < group.rows; ++r)
    for (int64_t j = 0; j < d.cols; ++j) group.codes[j][r] = d.codes[(row + r) * d.pitch + j];
  for (int64_t j = 0; j < d.cols; ++j) {
    Chosen chosen;
    recall(j, group, chosen);
    set_numbers(d, chosen, group);
    for (int t = 0; t < d.tiers; ++t)
      for (int s = 0; s < kSlices; ++s) group.slices[s].level[t][j] = group.numbers[t][s];
  }
}

/// Loads rows [row, row + rows) of a block.
void load_group(const Descent& d, int64_t row, int rows, TrellisGroup& group) {
  group.rows = rows;
  group.planes = d.bits[d.tiers - 1] - 1;
  for (int t = 0; t < d.tiers; ++t)
    for (int plane = 0; plane + 2 <= d.bits[t]; ++plane) {
      float widest = 0.0f;
      for (int i = 0; i < 2; ++i)
        for (int own = 0; own < 4; ++own)
          for (int above = 0; above < 4; ++above) {
            const float number = trellis_level(d.bits[t], plane, i, own + 4 * above);
            group.added[t][plane][i][4 * own + above] = number;
            widest = std::max(widest, std::fabs(number));
          }
      group.widest[t][plane] = widest;
    }
  for (DescentTile& tile : group.slices)
    for (int t = 0; t < d.tiers; ++t) {
      std::memset(static_cast<void*>(tile.slope[t]), 0, sizeof tile.slope[t]);
      std::memset(static_cast<void*>(tile.level[t]), 0, sizeof tile.level[t]);
      tile.scale[t] = tile.unit[t] = Floats{};
    }
  std::memset(group.codes, 0, sizeof group.codes);
  if (!d.weight) read_codes(d, row, group);
  for (int t = 0; t < d.tiers; ++t) {
    for (int r = 0; r < rows; ++r) {
      DescentTile& tile = group.slices[r / kLanes];
      const int lane = r % kLanes;
      const float scale = d.scales[t * d.rows + row + r];
      tile.scale[t][lane] = scale;
      if (d.units) tile.unit[t][lane] = d.units[t * d.rows + row + r];
      const float* slope = d.slope + (t * d.rows + row + r) * d.cols;
      float *slopes = lanes_of(tile.slope[t]), *levels = lanes_of(tile.level[t]);
      for (int64_t j = 0; j < d.cols; ++j) slopes[j * kLanes + lane] = slope[j];
      if (d.weight && scale > 0.0f)
        for (int64_t j = 0; j < d.cols; ++j) levels[j * kLanes + lane] = d.weight[(row + r) * d.pitch + j] / scale;
    }
    for (DescentTile& tile : group.slices)
      for (int64_t j = 0; j < d.cols; ++j) tile.start[t][j] = tile.scale[t] * tile.level[t][j];
  }
}

/// Returns how much the error of a tier counts when the codes of a plane are chosen, and further planes are `all`
/// known.
float weight_of(const Descent& d, int t, int plane, bool all) {
  float weight = d.weights[t];
  if (!all)
    for (int bits = plane + 2; bits < d.bits[t]; ++bits) weight *= kAhead;
  return weight;
}

/// Returns the median over the rows of a group whose errors are not too small, or 1 if there are none.
float median_of(const Floats* errors, int rows) {
  float sorted[kTrellisRows];
  int count = 0;
  for (int r = 0; r < rows; ++r)
    if (at_row(errors, r) > kTooSmall) sorted[count++] = at_row(errors, r);
  if (!count) return 1.0f;
  std::sort(sorted, sorted + count);
  return sorted[count / 2];
}

/// Prepares to weigh the entries of all planes with the present scales.
void prepare_weighing(const Descent& d, TrellisGroup& group) {
  const Floats zero = {};
  for (int t = 0; t < d.tiers; ++t)
    for (int s = 0; s < kSlices; ++s) {
      const Floats scale = group.slices[s].scale[t];
      group.inverse[t][s] = scale > zero ? 1.0f / scale : zero;
    }
  for (int all = d.weight ? 0 : d.last; all < (d.weight ? 1 : 2); ++all)
    for (int plane = 0; plane < group.planes; ++plane) {
      Weighing& w = group.weighing[all][plane];
      Floats usual[kSlices] = {};
      for (int s = 0; s < kSlices; ++s)
        for (int t = 0; t < d.tiers; ++t) {
          if (d.bits[t] < plane + 2) continue;
          const Floats size = group.slices[s].scale[t] * (1.0f / kTrellisUnits[d.bits[t] - 2]);
          const float error = kUsualErrors[all ? d.bits[t] - 2 : plane];
          usual[s] += weight_of(d, t, plane, all) * error * size * size;
        }
      const float median = median_of(usual, group.rows), per_symbol = (plane ? 0.5f : 1.0f) * kUsualCost;
      const Floats least = zero + kLeastShare * per_symbol, most = zero + kMostShare * per_symbol;
      for (int s = 0; s < kSlices; ++s) {
        Floats cost = usual[s] * (per_symbol / median);
        cost = cost < least ? least : cost > most ? most : cost;
        const Floats unit = usual[s] > kTooSmall ? cost / usual[s] : zero;
        for (int t = 0; t < d.tiers; ++t) {
          if (d.bits[t] < plane + 2) continue;
          const Floats scale = group.slices[s].scale[t], weight = weight_of(d, t, plane, all) * unit;
          w.square[t][s] = weight * scale * scale, w.lean[t][s] = -2.0f * weight * scale;
        }
      }
      for (int r = 0; r < kTrellisRows; ++r) {
        Entries& plain = w.plain[plane ? r / 2 : r];
        if (!plane || r % 2 == 0) plain = Entries{};
        for (int t = 0; t < d.tiers; ++t) {
          if (d.bits[t] < plane + 2) continue;
          const float square = at_row(w.square[t], r);
          const Floats* numbers = reinterpret_cast<const Floats*>(group.added[t][plane][r % 2]);
          for (int p = 0; p < kEntryParts; ++p) plain.part[p] += square * (numbers[p] * numbers[p]);
        }
      }
    }
}

using SmallWords = uint16_t __attribute__((vector_size(2 * kLanes)));

/// Computes the costs of all entries of a plane, whose symbols stand for `span` rows each, over `count` tiers.
template <int span, int count>
void weigh_rows(const Weighing& w, const int* tiers, int plane, TrellisGroup& group) {
  for (int r = 0; r < group.rows; r += span) {
    Entries cost = w.plain[r / span];
    DYMOE_UNROLL for (int i = 0; i < span; ++i) {
      const float spared = at_row(group.spared, r + i);
      for (int p = 0; p < kEntryParts; ++p) cost.part[p] += spared;
      DYMOE_UNROLL for (int k = 0; k < count; ++k) {
        const float slope = at_row(group.slopes[tiers[k]], r + i);
        const Floats* numbers = reinterpret_cast<const Floats*>(group.added[tiers[k]][plane][i]);
        DYMOE_UNROLL for (int p = 0; p < kEntryParts; ++p) cost.part[p] += slope * numbers[p];
      }
    }
    DYMOE_UNROLL for (int p = 0; p < kEntryParts; ++p) {
      const Floats far = kFarCost * (1.0f - kFarRise) + kFarRise * cost.part[p], most = Floats{} + float(kMaxCost);
      const Floats risen = cost.part[p] < far ? cost.part[p] : far;
      const Ints whole = __builtin_convertvector(risen < most ? risen : most, Ints);
      const SmallWords words = __builtin_convertvector((whole > 0 ? whole : Ints{}) * 4, SmallWords);
      std::memcpy(group.costs[r / span].of[0] + p * kLanes, &words, sizeof words);
    }
  }
}

template <int span>
void weigh_rows(const Weighing& w, const int* tiers, int count, int plane, TrellisGroup& group) {
  switch (count) {
    case 1:
      return weigh_rows<span, 1>(w, tiers, plane, group);
    case 2:
      return weigh_rows<span, 2>(w, tiers, plane, group);
    case 3:
      return weigh_rows<span, 3>(w, tiers, plane, group);
    case 4:
      return weigh_rows<span, 4>(w, tiers, plane, group);
    default:
      return weigh_rows<span, 5>(w, tiers, plane, group);
  }
}
static_assert(kMaxTrellis - 1 == 5);

/// Computes the costs of all entries of a plane, whole numbers up to kMaxCost.
void weigh_entries(const Descent& d, int plane, bool all, TrellisGroup& group) {
  const Weighing& w = group.weighing[all][plane];
  int tiers[kMaxTiers], count = 0;
  for (int t = 0; t < d.tiers; ++t)
    if (d.bits[t] >= plane + 2) tiers[count++] = t;
  for (int s = 0; s < kSlices; ++s) {
    Floats spared = {};
    for (int i = 0; i < count; ++i) {
      const int t = tiers[i];
      const Floats rest = group.targets[t][s] - group.slices[s].scale[t] * group.numbers[t][s];
      const Floats wanted = rest * group.inverse[t][s], widest = Floats{} + group.widest[t][plane];
      Floats reached = wanted < widest ? wanted : widest;
      reached = reached > -widest ? reached : -widest;
      spared += w.square[t][s] * reached * (2.0f * wanted - reached);
      group.slopes[t][s] = w.lean[t][s] * rest;
    }
    group.spared[s] = spared;
  }
  if (plane)
    weigh_rows<2>(w, tiers, count, plane, group);
  else
    weigh_rows<1>(w, tiers, count, plane, group);
  // The bit of a row that the last pair lacks is 0.
  if (plane && group.rows % 2)
    for (int own = 2; own < 4; ++own)
      for (int above = 0; above < 4; ++above) group.costs[group.rows / 2].of[own][above] = 4 * kForbidden;
}

/// Finds the path of a plane, and adds what it stands for to numbers. `known` is as for find_ring.
void choose_plane(const Descent& d, int plane, bool all, const uint8_t* known, TrellisGroup& group, uint8_t* symbols) {
  weigh_entries(d, plane, all, group);
  find_ring(group.costs, plane ? (group.rows + 1) / 2 : group.rows, known, group.steps, symbols);
  add_numbers(d, plane, 1.0f, symbols, group);
}

/// Returns the error of the column whose codes are chosen, summed over rows and tiers in the same order on all
/// instruction sets.
float cost_of(const Descent& d, const TrellisGroup& group) {
  Entries costs{};
  for (int t = 0; t < d.tiers; ++t)
    for (int s = 0; s * kLanes < group.rows; ++s) {
      const Floats error = group.slices[s].scale[t] * group.numbers[t][s] - group.targets[t][s];
      costs.part[s % kEntryParts] += d.weights[t] * error * error;
    }
  float total = 0.0f;
  for (int i = 0; i < kEntries; ++i) total += at_row(costs.part, i);
  return total;
}

/// Chooses one plane after another anew, with the others as they are.
void improve(const Descent& d, TrellisGroup& group, Chosen& chosen) {
  for (int plane = group.planes > 1; plane < group.planes; ++plane) {
    uint8_t known[kTrellisRows];
    std::memcpy(known, chosen.symbols[plane], sizeof known);
    add_numbers(d, plane, -1.0f, known, group);
    choose_plane(d, plane, true, known, group, chosen.symbols[plane]);
  }
}

/// Chooses one plane after the other, from the first on.
void choose_planes(const Descent& d, TrellisGroup& group, Chosen& chosen) {
  std::memset(static_cast<void*>(group.numbers), 0, d.tiers * sizeof *group.numbers);
  for (int plane = 0; plane < group.planes; ++plane)
    choose_plane(d, plane, false, nullptr, group, chosen.symbols[plane]);
}

/// Chooses the codes of column j for all rows, and returns the new levels of each tier in group.numbers. Except in
/// the last visit, new codes are chosen. The better of those and the present ones are then improved, if that lowers the
/// error.
void choose_column(const Descent& d, int64_t j, TrellisGroup& group) {
  const float h = d.hessian[j * d.hessian_pitch + j];
  const float inverse = h > kTiny ? 1.0f / h : 0.0f;
  for (int t = 0; t < d.tiers; ++t)
    for (int s = 0; s < kSlices; ++s) {
      const DescentTile& tile = group.slices[s];
      group.targets[t][s] = tile.scale[t] * tile.level[t][j] - tile.slope[t][j] * inverse;
      group.numbers[t][s] = tile.level[t][j];
    }
  Chosen chosen{}, other{};
  if (d.weight) {
    choose_planes(d, group, chosen);
    return set_codes(chosen, j, group);
  }
  float cost = cost_of(d, group);
  recall(j, group, chosen);
  const size_t bytes = d.tiers * sizeof *group.numbers;
  std::memcpy(static_cast<void*>(group.kept), group.numbers, bytes);
  for (int i = d.last ? 1 : 0; i < 2; ++i) {
    if (i)
      improve(d, group, other = chosen);
    else
      choose_planes(d, group, other);
    const float found = cost_of(d, group);
    if (found < cost) {
      cost = found, chosen = other;
      std::memcpy(static_cast<void*>(group.kept), group.numbers, bytes);
    } else if (!i) {
      std::memcpy(static_cast<void*>(group.numbers), group.kept, bytes);
    }
  }
  std::memcpy(static_cast<void*>(group.numbers), group.kept, bytes);
  set_codes(chosen, j, group);
}

/// Gives columns [first, stop), at most kTogether, their best codes, one after another.
void choose_codes(const Descent& d, int64_t first, int64_t stop, TrellisGroup& group) {
  for (int64_t j = first; j < stop; ++j) {
    choose_column(d, j, group);
    for (int s = 0; s < kSlices; ++s) {
      DescentTile& tile = group.slices[s];
      for (int t = 0; t < d.tiers; ++t) {
        Floats* moved = group.moved[t][s];
        const Floats level = group.numbers[t][s];
        moved[j - first] = tile.scale[t] * (level - tile.level[t][j]);
        tile.level[t][j] = level;
        move_slopes(d, j, j + 1, moved + (j - first), first, stop, tile.slope[t]);
      }
    }
  }
  for (int s = 0; s < kSlices; ++s)
    for (int t = 0; t < d.tiers; ++t) {
      Floats* slopes = group.slices[s].slope[t];
      // Slopes of earlier columns matter only to the scales that are fitted afterwards.
      if (d.weight || d.last) move_slopes(d, first, stop, group.moved[t][s], 0, first, slopes);
      move_slopes(d, first, stop, group.moved[t][s], stop, d.cols, slopes);
    }
}

void store_group(const Descent& d, int64_t row, TrellisGroup& group) {
  for (int r = 0; r < group.rows; ++r)
    for (int64_t j = 0; j < d.cols; ++j) d.codes[(row + r) * d.pitch + j] = group.codes[j][r];
  for (int s = 0; s * kLanes < group.rows; ++s) {
    DescentTile& tile = group.slices[s];
    const int64_t first = row + s * kLanes, rows = group.rows - s * kLanes < kLanes ? group.rows - s * kLanes : kLanes;
    for (int t = 0; t < d.tiers; ++t) {
      for (int64_t j = 0; j < d.cols; ++j) tile.start[t][j] = tile.scale[t] * tile.level[t][j] - tile.start[t][j];
      const float* moved = lanes_of(tile.start[t]);
      for (int64_t r = 0; r < rows; ++r) {
        d.scales[t * d.rows + first + r] = tile.scale[t][r];
        float* error = d.error + (t * d.rows + first + r) * d.pitch;
        for (int64_t j = 0; j < d.cols; ++j) error[j] += moved[j * kLanes + r];
      }
    }
  }
}

void fit_scales(const Descent& d, TrellisGroup& group) {
  for (int s = 0; s * kLanes < group.rows; ++s)
    for (int t = 0; t < d.tiers; ++t) fit_scale(d, t, group.slices[s]);
}

void choose_columns(const Descent& d, TrellisGroup& group) {
  prepare_weighing(d, group);
  for (int64_t j = 0; j < d.cols; j += kTogether)
    choose_codes(d, j, j + kTogether < d.cols ? j + kTogether : d.cols, group);
}

/// Visits a group: fits scales, chooses codes, and in the last visit fits scales again. In the first visit, which has
/// the weights themselves instead of codes, scales are fitted to the first choice.
void visit_group(const Descent& d, int64_t row, int rows, TrellisGroup& group) {
  load_group(d, row, rows, group);
  if (d.weight) {
    choose_columns(d, group);
    fit_scales(d, group);
  } else {
    fit_scales(d, group);
    choose_columns(d, group);
    if (d.last) fit_scales(d, group);
  }
  store_group(d, row, group);
}

/// See Kernels::descend.
void descend(const Descent& d, int64_t row, int64_t rows, uint8_t* scratch) {
  if (!d.trellis) return visit_rows(d, row, rows);
  TrellisGroup& group = *reinterpret_cast<TrellisGroup*>(scratch);
  for (int64_t r = 0; r < rows; r += kTrellisRows)
    visit_group(d, row + r, int(rows - r < kTrellisRows ? rows - r : kTrellisRows), group);
}

}  // namespace
}  // namespace dymoe

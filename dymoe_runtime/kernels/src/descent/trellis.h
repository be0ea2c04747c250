// Coordinate descent on one block of columns of a matrix on the trellis grid; see tiers.py for what its codes mean.
//
// The number of a weight depends on the codes of the rows above it. So the codes of a column are chosen for all rows of
// a group at once, plane after plane, each by the algorithm of Viterbi (1967). Slopes and scales are those of
// descend.h.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cstring>

#include "descent/descend.h"
#include "kernels.h"
#include "templates/sources.h"
#include "trellis_tables.h"

namespace dymoe {
namespace {

constexpr int kEntries = 16;                    // of a table: own two bits and two bits of the rows above
constexpr int kEntryParts = kEntries / kLanes;  // vectors of a value for each entry
constexpr int kSlices = kTrellisRows / kLanes;  // vectors of a value for each row of a group
// How much the error that a plane leaves at a higher tier counts, for each plane that is still to come. On the
// reference model 0.15 had 7% less KL at 2 bits and 9% more at 4; 1 had 15% more at 2 bits and 9% more at 3.
constexpr float kAhead = 0.35f;

/// A value for each entry, at place 4 * own + above: so the four values of `above` are neighbours.
struct Entries {
  Floats part[kEntryParts];
};

#if defined(__clang__)
#define DYMOE_CHOOSE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DYMOE_CHOOSE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

/// Returns a vector whose lane i is lane i ^ K of `v`, K < 4.
template <int K>
DYMOE_INLINE Floats exchanged(const Floats& v) {
#if defined(__AVX512F__)
  return DYMOE_CHOOSE(v, v, 0 ^ K, 1 ^ K, 2 ^ K, 3 ^ K, 4 ^ K, 5 ^ K, 6 ^ K, 7 ^ K, 8 ^ K, 9 ^ K, 10 ^ K, 11 ^ K,
                      12 ^ K, 13 ^ K, 14 ^ K, 15 ^ K);
#elif defined(__AVX2__)
  return DYMOE_CHOOSE(v, v, 0 ^ K, 1 ^ K, 2 ^ K, 3 ^ K, 4 ^ K, 5 ^ K, 6 ^ K, 7 ^ K);
#else
  return DYMOE_CHOOSE(v, v, 0 ^ K, 1 ^ K, 2 ^ K, 3 ^ K);
#endif
}

/// Returns entry 4 * i + k as entry 4 * k + i.
DYMOE_INLINE Entries transposed(const Entries& e) {
  const Floats(&v)[kEntryParts] = e.part;
#if defined(__AVX512F__)
  return {{DYMOE_CHOOSE(v[0], v[0], 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)}};
#elif defined(__AVX2__)
  return {{DYMOE_CHOOSE(v[0], v[1], 0, 4, 8, 12, 1, 5, 9, 13), DYMOE_CHOOSE(v[0], v[1], 2, 6, 10, 14, 3, 7, 11, 15)}};
#else
  const Floats a = DYMOE_CHOOSE(v[0], v[1], 0, 4, 1, 5), b = DYMOE_CHOOSE(v[2], v[3], 0, 4, 1, 5);
  const Floats c = DYMOE_CHOOSE(v[0], v[1], 2, 6, 3, 7), d = DYMOE_CHOOSE(v[2], v[3], 2, 6, 3, 7);
  return {{DYMOE_CHOOSE(a, b, 0, 1, 4, 5), DYMOE_CHOOSE(a, b, 2, 3, 6, 7), DYMOE_CHOOSE(c, d, 0, 1, 4, 5),
           DYMOE_CHOOSE(c, d, 2, 3, 6, 7)}};
#endif
}

/// Returns floats 4 * K to 4 * K + 3 of `e`, over and over.
template <int K>
DYMOE_INLINE Floats repeated(const Entries& e) {
#if defined(__AVX512F__)
  constexpr int k = 4 * K;
  return DYMOE_CHOOSE(e.part[0], e.part[0], k, k + 1, k + 2, k + 3, k, k + 1, k + 2, k + 3, k, k + 1, k + 2, k + 3, k,
                      k + 1, k + 2, k + 3);
#elif defined(__AVX2__)
  constexpr int k = 4 * (K % 2);
  return DYMOE_CHOOSE(e.part[K / 2], e.part[K / 2], k, k + 1, k + 2, k + 3, k, k + 1, k + 2, k + 3);
#else
  return e.part[K];
#endif
}

/// Returns floats 4 * K to 4 * K + 3 of each of four, one after the other.
template <int K>
DYMOE_INLINE Entries joined(const Entries (&e)[4]) {
#if defined(__AVX512F__)
  constexpr int k = 4 * K;
  const Floats a = DYMOE_CHOOSE(e[0].part[0], e[1].part[0], k, k + 1, k + 2, k + 3, k + 16, k + 17, k + 18, k + 19, k,
                                k + 1, k + 2, k + 3, k + 16, k + 17, k + 18, k + 19);
  const Floats b = DYMOE_CHOOSE(e[2].part[0], e[3].part[0], k, k + 1, k + 2, k + 3, k + 16, k + 17, k + 18, k + 19, k,
                                k + 1, k + 2, k + 3, k + 16, k + 17, k + 18, k + 19);
  return {{DYMOE_CHOOSE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)}};
#elif defined(__AVX2__)
  constexpr int k = 4 * (K % 2);
  return {{DYMOE_CHOOSE(e[0].part[K / 2], e[1].part[K / 2], k, k + 1, k + 2, k + 3, k + 8, k + 9, k + 10, k + 11),
           DYMOE_CHOOSE(e[2].part[K / 2], e[3].part[K / 2], k, k + 1, k + 2, k + 3, k + 8, k + 9, k + 10, k + 11)}};
#else
  return {{e[0].part[K], e[1].part[K], e[2].part[K], e[3].part[K]}};
#endif
}

/// The cost of the cheapest path to each state of a trellis: [last but one][last but two][last symbol]. It stays in
/// registers: what was written in pieces is slow to read as a whole.
struct Paths {
  Entries cost[4];
};

/// One step of all paths, [last but one][new symbol][last]: the symbol that falls out of the state.
struct Step {
  alignas(64) int8_t fallen[4][4][4];
};

using SmallInts = int8_t __attribute__((vector_size(kLanes)));

/// Compares paths whose third symbol is K with the cheapest so far.
template <int K>
DYMOE_INLINE void compare(const Entries& old, const Floats (&by_fallen)[4][kEntryParts], Entries& least,
                          Ints (&fallen)[kEntryParts]) {
  const Floats last = repeated<K>(old);
  DYMOE_UNROLL for (int p = 0; p < kEntryParts; ++p) {
    const Floats cost = last + by_fallen[K][p];
    if constexpr (K == 0) {
      least.part[p] = cost, fallen[p] = Ints{};
    } else {
      const Ints better = cost < least.part[p];
      fallen[p] = better ? Ints{} + K : fallen[p];
      least.part[p] = better ? cost : least.part[p];
    }
  }
}

/// Takes the paths one symbol further. The entry that a symbol asks for depends on the last symbol and on the third.
DYMOE_INLINE void extend(const Entries& errors, Paths& paths, Step& step) {
  Floats by_fallen[4][kEntryParts];
  DYMOE_UNROLL for (int p = 0; p < kEntryParts; ++p) {
    by_fallen[0][p] = errors.part[p], by_fallen[1][p] = exchanged<1>(errors.part[p]);
    by_fallen[2][p] = exchanged<2>(errors.part[p]), by_fallen[3][p] = exchanged<3>(errors.part[p]);
  }
  Entries by_last[4];
  DYMOE_UNROLL for (int m = 0; m < 4; ++m) {
    Entries least;
    Ints fallen[kEntryParts];
    compare<0>(paths.cost[m], by_fallen, least, fallen), compare<1>(paths.cost[m], by_fallen, least, fallen);
    compare<2>(paths.cost[m], by_fallen, least, fallen), compare<3>(paths.cost[m], by_fallen, least, fallen);
    DYMOE_UNROLL for (int p = 0; p < kEntryParts; ++p) {
      const SmallInts small = __builtin_convertvector(fallen[p], SmallInts);
      std::memcpy(&step.fallen[m][0][0] + p * kLanes, &small, sizeof small);
    }
    by_last[m] = transposed(least);
  }
  paths = {{joined<0>(by_last), joined<1>(by_last), joined<2>(by_last), joined<3>(by_last)}};
}

constexpr float kNever = 1e30f;  // cost of what may not be chosen

/// The three symbols that a path begins with: the last but two, the last but one, the last.
struct Before {
  uint8_t symbol[3];
};

/// Returns in symbols [count] those of the path of least cost; errors [count]. A null `before` leaves open how it
/// begins.
void find_path(const Entries* errors, int count, const Before* before, Step* steps, uint8_t* symbols) {
  float cost[4][4][4];
  for (int i = 0; i < 4 * kEntries; ++i) cost[i / 16][i / 4 % 4][i % 4] = before ? kNever : 0.0f;
  if (before) cost[before->symbol[1]][before->symbol[0]][before->symbol[2]] = 0.0f;
  Paths paths;
  std::memcpy(static_cast<void*>(&paths), cost, sizeof cost);
  for (int i = 0; i < count; ++i) extend(errors[i], paths, steps[i]);
  std::memcpy(cost, &paths, sizeof cost);
  int m = 0, k = 0, last = 0;
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b)
      for (int c = 0; c < 4; ++c)
        if (cost[a][b][c] < cost[m][k][last]) m = a, k = b, last = c;
  for (int i = count - 1; i >= 0; --i) {
    symbols[i] = uint8_t(last);
    const int fallen = steps[i].fallen[k][last][m];
    last = m, m = k, k = fallen;
  }
}

/// Returns the length of the ring that `count` symbols of a column form, or 0 if they are too few: the symbols above
/// the first are the last of the ring. It is even, because every second row of symbols is swapped.
int ring_of(int count) { return count < kTrellisRing ? 0 : count / 2 * 2; }

constexpr int kAround = 12;  // symbols after which it matters little how a path begins, or ends

/// Returns in symbols [count] a cheap path that closes its ring: it begins with its last symbols. They are those of
/// `known`, or, if that is null, of the best path around the place where the ring closes. Changes errors.
void find_ring(Entries* errors, int count, const uint8_t* known, Step* steps, uint8_t* symbols) {
  const int ring = ring_of(count);
  Before before{};
  if (ring) {
    if (known) {
      std::memcpy(before.symbol, known + ring - 3, sizeof before.symbol);
    } else {
      const int each = ring < kAround ? ring : kAround;
      Entries around[2 * kAround];
      uint8_t found[2 * kAround];
      std::memcpy(static_cast<void*>(around), errors + ring - each, each * sizeof *around);
      std::memcpy(static_cast<void*>(around + each), errors, each * sizeof *around);
      find_path(around, 2 * each, nullptr, steps, found);
      std::memcpy(before.symbol, found + each - 3, sizeof before.symbol);
    }
    for (int i = 0; i < 3; ++i) {
      float* costs = reinterpret_cast<float*>(errors[ring - 3 + i].part);
      for (int entry = 0; entry < kEntries; ++entry)
        if (entry / 4 != before.symbol[i]) costs[entry] = kNever;
    }
  }
  find_path(errors, count, &before, steps, symbols);
}

/// The rows of a group, or the last rows of a matrix, kLanes in each slice.
struct TrellisGroup {
  DescentTile slices[kSlices];
  int rows;
  int planes;                              // of the highest tier
  Floats targets[kMaxTiers][kSlices];      // of the column whose codes are chosen: what the value should be
  float numbers[kMaxTiers][kTrellisRows];  // of that column, by the planes that are chosen so far
  float kept[kMaxTiers][kTrellisRows];     // numbers of other codes
  uint8_t symbols[kTrellisRows];           // of one plane: of each row, or of each pair of rows
  uint8_t codes[kTrellisRows];             // by the planes that are chosen so far
  // [tier][plane][row of a pair]: what an entry adds to the level, in the order of Entries
  alignas(64) float added[kMaxTiers][kMaxTrellisPlanes][2][kEntries];
  Entries errors[kTrellisRows];
  Step steps[kTrellisRows];
};

/// Returns in entries [count] those that symbols ask for, in the order of Entries.
void entries_of(const uint8_t* symbols, int count, uint8_t* entries) {
  const int ring = ring_of(count);
  for (int i = 0; i < count && i < 3; ++i) {
    const int above =
        ring ? (i > 0 ? symbols[i - 1] : symbols[ring - 1]) ^ symbols[ring + i - 3] : (i > 0 ? symbols[i - 1] : 0);
    entries[i] = uint8_t(4 * symbols[i] + above);
  }
  for (int i = 3; i < count; ++i) entries[i] = uint8_t(4 * symbols[i] + (symbols[i - 1] ^ symbols[i - 3]));
}

/// Returns the float at row `row` of a value in slices.
float at_row(const Floats* slices, int row) { return reinterpret_cast<const float*>(slices)[row]; }

/// Adds to `numbers` [rows] of a tier what the entries of a plane stand for.
void add_numbers(const float (&added)[2][kEntries], int plane, int rows, const uint8_t* entries, float* numbers) {
  if (plane == 0)
    for (int r = 0; r < rows; ++r) numbers[r] += added[0][entries[r]];
  else
    for (int r = 0; r < rows; ++r) numbers[r] += added[r % 2][entries[r / 2]];
}

/// Returns in entries [rows, or pairs of rows] those of a plane of column j, by its codes.
void stored_entries(const Descent& d, int64_t row, int64_t j, int plane, int rows, uint8_t* entries) {
  const int shift = d.bits[d.tiers - 1] - 2 - plane;
  uint8_t symbols[kTrellisRows] = {};
  for (int r = 0; r < rows; ++r) {
    const int code = d.codes[(row + r) * d.pitch + j] >> shift;
    if (plane == 0)
      symbols[r] = uint8_t(code & 3);
    else
      symbols[r / 2] |= uint8_t((code & 1) << (r % 2));
  }
  entries_of(symbols, plane ? (rows + 1) / 2 : rows, entries);
}

/// Reads the levels of all tiers from the codes of `cols` columns.
void read_levels(const Descent& d, int64_t row, TrellisGroup& group) {
  for (int64_t j = 0; j < d.cols; ++j) {
    for (int t = 0; t < d.tiers; ++t) {
      float numbers[kTrellisRows] = {};
      for (int plane = 0; plane + 2 <= d.bits[t]; ++plane) {
        uint8_t entries[kTrellisRows];
        stored_entries(d, row, j, plane, group.rows, entries);
        add_numbers(group.added[t][plane], plane, group.rows, entries, numbers);
      }
      for (int r = 0; r < group.rows; ++r) lanes_of(&group.slices[r / kLanes].level[t][j])[r % kLanes] = numbers[r];
    }
  }
}

/// Loads rows [row, row + rows) of a block.
void load_group(const Descent& d, int64_t row, int rows, TrellisGroup& group) {
  group.rows = rows;
  group.planes = d.bits[d.tiers - 1] - 1;
  for (int t = 0; t < d.tiers; ++t)
    for (int plane = 0; plane + 2 <= d.bits[t]; ++plane)
      for (int i = 0; i < 2; ++i)
        for (int own = 0; own < 4; ++own)
          for (int above = 0; above < 4; ++above)
            group.added[t][plane][i][4 * own + above] = trellis_level(d.bits[t], plane, i, own + 4 * above);
  for (int s = 0; s < kSlices; ++s) {
    DescentTile& tile = group.slices[s];
    for (int t = 0; t < d.tiers; ++t) {
      std::memset(static_cast<void*>(tile.slope[t]), 0, sizeof tile.slope[t]);
      std::memset(static_cast<void*>(tile.level[t]), 0, sizeof tile.level[t]);
      tile.scale[t] = tile.unit[t] = Floats{};
    }
  }
  if (!d.weight) read_levels(d, row, group);
  for (int t = 0; t < d.tiers; ++t) {
    for (int r = 0; r < rows; ++r) {
      DescentTile& tile = group.slices[r / kLanes];
      const int lane = r % kLanes;
      const float scale = d.scales[t * d.rows + row + r];
      tile.scale[t][lane] = scale;
      if (d.units) tile.unit[t][lane] = d.units[t * d.rows + row + r];
      const float* slope = d.slope + (t * d.rows + row + r) * d.cols;
      float *slopes = lanes_of(tile.slope[t]), *levels = lanes_of(tile.level[t]);
      for (int64_t j = 0; j < d.cols; ++j) {
        slopes[j * kLanes + lane] = slope[j];
        if (d.weight) levels[j * kLanes + lane] = scale > 0.0f ? d.weight[(row + r) * d.pitch + j] / scale : 0.0f;
      }
    }
    for (DescentTile& tile : group.slices)
      for (int64_t j = 0; j < d.cols; ++j) tile.start[t][j] = tile.scale[t] * tile.level[t][j];
  }
}

/// Computes the errors of all entries of a plane in row r, or in rows r and r + 1 from the second plane on. Tiers whose
/// further planes are not chosen yet count less.
void weigh_entries(const Descent& d, const TrellisGroup& group, int plane, int r, bool all, Entries& errors) {
  errors = Entries{};
  float ahead = 1.0f;
  for (int t = 0, reached = plane + 2; t < d.tiers; ++t) {
    if (d.bits[t] < plane + 2) continue;
    for (; reached < d.bits[t]; ++reached) ahead *= all ? 1.0f : kAhead;
    const float weight = d.weights[t] * ahead;
    for (int i = r; i < r + (plane ? 2 : 1) && i < group.rows; ++i) {
      const float scale = at_row(&group.slices[i / kLanes].scale[t], i % kLanes);
      const float rest = at_row(group.targets[t], i) - scale * group.numbers[t][i];
      const Floats* numbers = reinterpret_cast<const Floats*>(group.added[t][plane][i % 2]);
      for (int p = 0; p < kEntryParts; ++p) {
        const Floats error = scale * numbers[p] - rest;
        errors.part[p] += weight * error * error;
      }
    }
  }
  // The bit of a row that the last pair lacks is 0.
  if (plane && r + 1 == group.rows) {
    float* costs = reinterpret_cast<float*>(errors.part);
    for (int entry = kEntries / 2; entry < kEntries; ++entry) costs[entry] = kNever;
  }
}

/// Finds the path of a plane, and adds what it stands for to numbers. `known` is as for find_ring.
void choose_plane(const Descent& d, int plane, bool all, const uint8_t* known, TrellisGroup& group, uint8_t* entries) {
  const int span = plane ? 2 : 1, count = (group.rows + span - 1) / span;
  for (int i = 0; i < count; ++i) weigh_entries(d, group, plane, i * span, all, group.errors[i]);
  find_ring(group.errors, count, known, group.steps, group.symbols);
  entries_of(group.symbols, count, entries);
  for (int t = 0; t < d.tiers; ++t)
    if (d.bits[t] >= plane + 2) add_numbers(group.added[t][plane], plane, group.rows, entries, group.numbers[t]);
}

/// Returns the error of the column whose codes are chosen, summed over rows and tiers in the same order on all
/// instruction sets.
float cost_of(const Descent& d, const TrellisGroup& group) {
  Entries costs{};
  for (int t = 0; t < d.tiers; ++t)
    for (int s = 0; s * kLanes < group.rows; ++s) {
      Floats number;
      std::memcpy(&number, group.numbers[t] + s * kLanes, sizeof number);
      const Floats error = group.slices[s].scale[t] * number - group.targets[t][s];
      costs.part[s % kEntryParts] += d.weights[t] * error * error;
    }
  float total = 0.0f;
  for (int i = 0; i < kEntries; ++i) total += at_row(costs.part, i);
  return total;
}

/// The entries of each plane.
struct Chosen {
  uint8_t entries[kMaxTrellisPlanes][kTrellisRows];
};

/// Chooses one plane after another anew, with the others as they are.
void improve(const Descent& d, TrellisGroup& group, Chosen& chosen) {
  for (int plane = 0; plane < group.planes; ++plane) {
    uint8_t* entries = chosen.entries[plane];
    uint8_t known[kTrellisRows];
    for (int i = 0; i < (plane ? (group.rows + 1) / 2 : group.rows); ++i) known[i] = entries[i] / 4;
    for (int t = 0; t < d.tiers; ++t)
      if (d.bits[t] >= plane + 2)
        for (int r = 0; r < group.rows; ++r)
          group.numbers[t][r] -= group.added[t][plane][r % 2][entries[plane ? r / 2 : r]];
    choose_plane(d, plane, true, known, group, entries);
  }
}

/// Returns the entries of column j by its codes, and its numbers in group.numbers.
void recall(const Descent& d, int64_t row, int64_t j, TrellisGroup& group, Chosen& chosen) {
  for (int plane = 0; plane < group.planes; ++plane)
    stored_entries(d, row, j, plane, group.rows, chosen.entries[plane]);
  for (int t = 0; t < d.tiers; ++t)
    for (int s = 0; s < kSlices; ++s)
      std::memcpy(group.numbers[t] + s * kLanes, &group.slices[s].level[t][j], sizeof(Floats));
}

/// Chooses one plane after the other, from the first on.
void choose_planes(const Descent& d, TrellisGroup& group, Chosen& chosen) {
  std::memset(group.numbers, 0, sizeof group.numbers);
  for (int plane = 0; plane < group.planes; ++plane)
    choose_plane(d, plane, false, nullptr, group, chosen.entries[plane]);
}

/// Sets group.codes by the entries of all planes.
void set_codes(const Chosen& chosen, TrellisGroup& group) {
  for (int r = 0; r < group.rows; ++r) {
    int code = chosen.entries[0][r] / 4;
    for (int plane = 1; plane < group.planes; ++plane)
      code = 2 * code | ((chosen.entries[plane][r / 2] >> (2 + r % 2)) & 1);
    group.codes[r] = uint8_t(code);
  }
}

/// Chooses the codes of column j for all rows, and returns the new levels of each tier in group.numbers. Codes that
/// there are already are improved. But the last visit, new ones are chosen beside them, and the better ones stay.
void choose_column(const Descent& d, int64_t row, int64_t j, TrellisGroup& group) {
  const float h = d.hessian[j * d.hessian_pitch + j];
  const float inverse = h > kTiny ? 1.0f / h : 0.0f;
  for (int t = 0; t < d.tiers; ++t)
    for (int s = 0; s < kSlices; ++s) {
      const DescentTile& tile = group.slices[s];
      group.targets[t][s] = tile.scale[t] * tile.level[t][j] - tile.slope[t][j] * inverse;
    }
  Chosen chosen;
  if (d.weight) {
    choose_planes(d, group, chosen);
  } else {
    recall(d, row, j, group, chosen);
    improve(d, group, chosen);
    if (!d.last) {
      const float cost = cost_of(d, group);
      Chosen other;
      std::memcpy(group.kept, group.numbers, sizeof group.kept);
      choose_planes(d, group, other);
      if (cost_of(d, group) < cost)
        chosen = other;
      else
        std::memcpy(group.numbers, group.kept, sizeof group.kept);
    }
  }
  set_codes(chosen, group);
}

/// Gives all columns their best codes, one after another.
void choose_columns(const Descent& d, int64_t row, TrellisGroup& group) {
  for (int64_t j = 0; j < d.cols; ++j) {
    choose_column(d, row, j, group);
    for (int r = 0; r < group.rows; ++r) d.codes[(row + r) * d.pitch + j] = group.codes[r];
    for (int s = 0; s < kSlices && s * kLanes < group.rows; ++s) {
      DescentTile& tile = group.slices[s];
      for (int t = 0; t < d.tiers; ++t) {
        Floats level;
        std::memcpy(&level, group.numbers[t] + s * kLanes, sizeof level);
        const Floats moved = tile.scale[t] * (level - tile.level[t][j]);
        tile.level[t][j] = level;
        move_slopes(d, j, j + 1, &moved, 0, d.cols, tile.slope[t]);
      }
    }
  }
}

void store_group(const Descent& d, int64_t row, TrellisGroup& group) {
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

/// Visits a group: fits scales, chooses codes, and in the last visit fits scales again. In the first visit, which has
/// the weights themselves instead of codes, scales are fitted to the first choice.
void visit_group(const Descent& d, int64_t row, int rows, TrellisGroup& group) {
  load_group(d, row, rows, group);
  if (d.weight) {
    choose_columns(d, row, group);
    fit_scales(d, group);
  } else {
    fit_scales(d, group);
    choose_columns(d, row, group);
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

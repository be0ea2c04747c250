// The cheapest path through the trellis of a column: the algorithm of Viterbi (1967), written once for every
// instruction set. Costs are whole numbers, so that all instruction sets choose the same path.
//
// A symbol is two bits. What it costs depends on itself and on the symbols one and three places before it, so a state
// is the last three symbols. States are kept as four lists of 16, and every step replaces the symbol that leaves by the
// new one, in place: what was last, second and third moves round, and after three steps everything is as before.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cstring>
#include <utility>

#include "kernels.h"
#include "templates/lanes.h"
#include "templates/sources.h"
#include "trellis_tables.h"

namespace dymoe {
namespace {

constexpr int kEntries = 16;  // of a table: own two bits and two bits of the symbols before

#if defined(__AVX2__)
constexpr int kWords = 16;
#else
constexpr int kWords = 8;
#endif
constexpr int kWordParts = kEntries / kWords;
typedef uint16_t Words __attribute__((vector_size(2 * kWords)));
typedef int16_t WordPlaces __attribute__((vector_size(2 * kWords)));

/// 16 numbers as four quads of four.
struct Quads {
  Words part[kWordParts];
};

// The most that one symbol may cost, and after how many steps the least cost is subtracted from all: so no sum passes
// 14 bits, at the top of the 16. The other two say which symbol left.
constexpr int kMaxCost = 1023;
constexpr int kAfresh = 6;
// What a symbol costs that must not be chosen. It is more than any three others cost together.
constexpr int kForbidden = 3 * kMaxCost + 1;
static_assert(kAfresh % 3 == 0 && 4 * ((kAfresh + 4) * kMaxCost + 2 * kForbidden) < 1 << 16);

#if defined(__clang__)
#define DYMOE_JOIN(a, b, type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DYMOE_JOIN(a, b, type, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

template <class From, int... i>
DYMOE_INLINE Words rearranged(const Words& v, std::integer_sequence<int, i...>) {
  return DYMOE_JOIN(v, v, WordPlaces, From::place(i) % kWords...);
}

/// Returns numbers From::place(i) of 16 as number i. Those of a part come from one part.
template <class From>
DYMOE_INLINE Quads rearranged(const Quads& q) {
  Quads out;
  DYMOE_UNROLL for (int p = 0; p < kWordParts; ++p) {
    constexpr auto all = std::make_integer_sequence<int, kWords>();
    out.part[p] = rearranged<From>(q.part[From::place(p * kWords) / kWords], all);
  }
  return out;
}

template <int K>
struct InOtherPlace {
  static constexpr int place(int i) { return i ^ K; }
};
template <int K>
struct OfSamePlace {
  static constexpr int place(int i) { return i / 4 * 4 + K; }
};
template <int K>
struct OfSameQuad {
  static constexpr int place(int i) { return 4 * K + i % 4; }
};

/// Swaps numbers i and i ^ K of each quad.
template <int K>
DYMOE_INLINE Quads swapped(const Quads& q) {
  return rearranged<InOtherPlace<K>>(q);
}

/// Swaps quads i and i ^ K.
template <int K>
DYMOE_INLINE Quads exchanged(const Quads& q) {
  return rearranged<InOtherPlace<4 * K>>(q);
}

/// Gives all numbers of each quad the value of its number K.
template <int K>
DYMOE_INLINE Quads spread(const Quads& q) {
  return rearranged<OfSamePlace<K>>(q);
}

/// Gives all quads the numbers of quad K.
template <int K>
DYMOE_INLINE Quads repeated(const Quads& q) {
  return rearranged<OfSameQuad<K>>(q);
}

/// Makes number K of quad I number I of quad K.
DYMOE_INLINE Quads transposed(const Quads& q) {
#if defined(__AVX2__)
  typedef int32_t Ints8 __attribute__((vector_size(32)));
  const Words& v = q.part[0];
  const Ints8 pairs = Ints8(DYMOE_JOIN(v, v, WordPlaces, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
  return {{Words(DYMOE_JOIN(pairs, pairs, Ints8, 0, 4, 1, 5, 2, 6, 3, 7))}};
#else
  return {{DYMOE_JOIN(q.part[0], q.part[1], WordPlaces, 0, 4, 8, 12, 1, 5, 9, 13),
           DYMOE_JOIN(q.part[0], q.part[1], WordPlaces, 2, 6, 10, 14, 3, 7, 11, 15)}};
#endif
}

/// Returns the four numbers at `quad` as each of four quads.
DYMOE_INLINE Quads all_quads(const uint16_t* quad) {
  typedef uint64_t Longs __attribute__((vector_size(2 * kWords)));
  uint64_t four;
  std::memcpy(&four, quad, sizeof four);
  Quads out = {};
  DYMOE_UNROLL for (Words& part : out.part) part = Words(Longs{} + four);
  return out;
}

DYMOE_INLINE Quads load(const uint16_t* numbers) {
  Quads out;
  std::memcpy(static_cast<void*>(&out), numbers, sizeof out);
  return out;
}

DYMOE_INLINE Quads operator+(Quads a, const Quads& b) {
  DYMOE_UNROLL for (int p = 0; p < kWordParts; ++p) a.part[p] += b.part[p];
  return a;
}

DYMOE_INLINE Quads least(Quads a, const Quads& b) {
  DYMOE_UNROLL for (int p = 0; p < kWordParts; ++p) a.part[p] = a.part[p] < b.part[p] ? a.part[p] : b.part[p];
  return a;
}

DYMOE_INLINE Quads least(const Quads& a, const Quads& b, const Quads& c, const Quads& d) {
  return least(least(a, b), least(c, d));
}

/// The cost of the cheapest path to each state, times four, plus the symbol that leaves the state next.
struct States {
  Quads list[4];
};

/// What a symbol costs, times four: [itself][those before].
struct Costs {
  alignas(32) uint16_t of[4][4];
};

/// What one step found: for each new state its cost, times four, plus the symbol that left.
struct Step {
  alignas(32) uint16_t left[64];
};

/// Keeps `states` as a step, and puts `leaving` in place of the symbols that left.
DYMOE_INLINE void keep(const Quads (&leaving)[4], States& states, Step& step) {
  DYMOE_UNROLL for (int i = 0; i < 4; ++i) {
    DYMOE_UNROLL for (int p = 0; p < kWordParts; ++p) {
      // One by one: what was written in pieces is slow to read as a whole.
      const Words found = states.list[i].part[p];
      std::memcpy(step.left + i * kEntries + p * kWords, &found, sizeof found);
      states.list[i].part[p] = (found & uint16_t(~3)) | leaving[i].part[p];
    }
  }
}

/// The symbols that leave, if those are the number of the list, of the quad, or of the place in a quad.
struct Leaving {
  Quads by_list[4], by_quad[4], by_place[4];
};

DYMOE_INLINE Leaving all_leaving() {
  alignas(32) uint16_t lists[4][kEntries], quads[kEntries], places[kEntries];
  for (int i = 0; i < kEntries; ++i) {
    quads[i] = uint16_t(i / 4), places[i] = uint16_t(i % 4);
    for (int l = 0; l < 4; ++l) lists[l][i] = uint16_t(l);
  }
  Leaving leaving;
  for (int l = 0; l < 4; ++l)
    leaving.by_list[l] = load(lists[l]), leaving.by_quad[l] = load(quads), leaving.by_place[l] = load(places);
  return leaving;
}

/// From [third][second][last] to [new][third][second] in the names of after the step: [last][third][second].
DYMOE_INLINE void step_lists(const Costs& costs, const Leaving& leaving, States& s, Step& step) {
  States next;
  DYMOE_UNROLL for (int own = 0; own < 4; ++own) {
    const Quads c = all_quads(costs.of[own]);
    next.list[own] =
        least(s.list[0] + c, s.list[1] + swapped<1>(c), s.list[2] + swapped<2>(c), s.list[3] + swapped<3>(c));
  }
  s = next;
  keep(leaving.by_quad, s, step);
}

/// From [last][third][second] to [second][last][third].
DYMOE_INLINE void step_quads(const Costs& costs, const Leaving& leaving, States& s, Step& step) {
  const Quads c = load(costs.of[0]);
  const Quads above[4] = {spread<0>(c), spread<1>(c), spread<2>(c), spread<3>(c)};
  DYMOE_UNROLL for (int last = 0; last < 4; ++last) {
    const Quads& from = s.list[last];
    s.list[last] = least(repeated<0>(from) + above[last], repeated<1>(from) + above[last ^ 1],
                         repeated<2>(from) + above[last ^ 2], repeated<3>(from) + above[last ^ 3]);
  }
  keep(leaving.by_place, s, step);
}

/// From [second][last][third] to [third][second][last].
DYMOE_INLINE void step_places(const Costs& costs, const Leaving& leaving, States& s, Step& step) {
  const Quads c = transposed(load(costs.of[0]));
  const Quads c1 = exchanged<1>(c), c2 = exchanged<2>(c), c3 = exchanged<3>(c);
  DYMOE_UNROLL for (int second = 0; second < 4; ++second) {
    const Quads& from = s.list[second];
    s.list[second] = least(spread<0>(from) + c, spread<1>(from) + c1, spread<2>(from) + c2, spread<3>(from) + c3);
  }
  keep(leaving.by_list, s, step);
}

/// Makes the cheapest path cost nothing.
DYMOE_INLINE void start_afresh(States& s) {
  Quads low = least(s.list[0], s.list[1], s.list[2], s.list[3]);
  low = least(low, swapped<1>(low)), low = least(low, swapped<2>(low));
  low = least(low, exchanged<1>(low)), low = least(low, exchanged<2>(low));
  DYMOE_UNROLL for (int i = 0; i < 4; ++i) {
    DYMOE_UNROLL for (int p = 0; p < kWordParts; ++p) s.list[i].part[p] -= low.part[p] & uint16_t(~3);
  }
}

/// The last three symbols of a path.
struct State {
  uint8_t last, second, third;
};

/// Where a state stands.
struct Place {
  int list, quad, place;
  int index() const { return 16 * list + 4 * quad + place; }
};

/// Returns where a state stands after `count` steps.
inline Place place_of(const State& s, int count) {
  switch (count % 3) {
    case 0:
      return {s.third, s.second, s.last};
    case 1:
      return {s.last, s.third, s.second};
    default:
      return {s.second, s.last, s.third};
  }
}

/// Goes back from what stands at `p` after the last step, and returns the symbols of its path. The symbol that left
/// stood where the new one stands.
inline void trace_back(const Step* steps, int count, Place p, uint8_t* symbols) {
  int i = count - 1;
  if (i % 3 == 1) symbols[i] = uint8_t(p.quad), p.quad = steps[i].left[p.index()] & 3, --i;
  if (i % 3 == 0) symbols[i] = uint8_t(p.list), p.list = steps[i].left[p.index()] & 3, --i;
  for (; i >= 0; i -= 3) {
    symbols[i] = uint8_t(p.place), p.place = steps[i].left[p.index()] & 3;
    symbols[i - 1] = uint8_t(p.quad), p.quad = steps[i - 1].left[p.index()] & 3;
    symbols[i - 2] = uint8_t(p.list), p.list = steps[i - 2].left[p.index()] & 3;
  }
}

/// Returns where the state stands whose path costs the least after the last step.
inline Place cheapest(const Step* steps, int count) {
  Place best{};
  int least = 1 << 16;
  for (uint8_t third = 0; third < 4; ++third)
    for (uint8_t second = 0; second < 4; ++second)
      for (uint8_t last = 0; last < 4; ++last) {
        const Place here = place_of({last, second, third}, count);
        const int cost = steps[count - 1].left[here.index()] >> 2;
        if (cost < least) least = cost, best = here;
      }
  return best;
}

/// Finds in symbols [count] the path of least cost after `before`, or after any symbols if that is null, that ends in
/// `after`, or in any state. costs and steps [count].
void find_path(const Costs* costs, int count, const State* before, const State* after, Step* steps, uint8_t* symbols) {
  const Leaving leaving = all_leaving();
  alignas(32) uint16_t first[64];
  for (int i = 0; i < 64; ++i) first[i] = uint16_t((before ? 4 * kForbidden : 0) + i / 16);
  if (before) first[place_of(*before, 0).index()] -= 4 * kForbidden;
  States s;
  std::memcpy(static_cast<void*>(&s), first, sizeof s);
  int i = 0;
  for (; i + 3 <= count; i += 3) {
    step_lists(costs[i], leaving, s, steps[i]);
    step_quads(costs[i + 1], leaving, s, steps[i + 1]);
    step_places(costs[i + 2], leaving, s, steps[i + 2]);
    if ((i + 3) % kAfresh == 0) start_afresh(s);
  }
  if (i < count) step_lists(costs[i], leaving, s, steps[i]), ++i;
  if (i < count) step_quads(costs[i], leaving, s, steps[i]);
  trace_back(steps, count, after ? place_of(*after, count) : cheapest(steps, count), symbols);
}

/// Returns the length of the ring that `count` symbols of a column form, or 0 if they are too few: the symbols above
/// the first are the last of the ring. It is even, because every second row of symbols is swapped.
int ring_of(int count) { return count < kTrellisRing ? 0 : count / 2 * 2; }

constexpr int kAround = 12;  // symbols after which it matters little how a path begins, or ends

/// Returns the state after the first `count` symbols, at least three.
State state_after(const uint8_t* symbols, int count) {
  return {symbols[count - 1], symbols[count - 2], symbols[count - 3]};
}

/// Returns in symbols [count] a cheap path that closes its ring: it begins with its last symbols. They are those of
/// `known`, or, if that is null, of the best path around the place where the ring closes.
void find_ring(const Costs* costs, int count, const uint8_t* known, Step* steps, uint8_t* symbols) {
  const int ring = ring_of(count);
  State ends{};
  if (!ring) return find_path(costs, count, &ends, nullptr, steps, symbols);
  if (known) {
    ends = state_after(known, ring);
  } else {
    Costs around[2 * kAround];
    uint8_t found[2 * kAround];
    std::memcpy(static_cast<void*>(around), costs + ring - kAround, kAround * sizeof *around);
    std::memcpy(static_cast<void*>(around + kAround), costs, kAround * sizeof *around);
    find_path(around, 2 * kAround, nullptr, nullptr, steps, found);
    ends = state_after(found, kAround);
  }
  find_path(costs, ring, &ends, &ends, steps, symbols);
  if (ring == count) return;
  const int above = symbols[ring - 1] ^ symbols[ring - 3];
  symbols[ring] = 0;
  for (uint8_t own = 1; own < 4; ++own)
    if (costs[ring].of[own][above] < costs[ring].of[symbols[ring]][above]) symbols[ring] = own;
}

#undef DYMOE_JOIN

}  // namespace
}  // namespace dymoe

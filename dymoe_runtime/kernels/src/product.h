// The kernels, written once over a `Vector` policy; an instruction set is a policy and `make_kernels`.
//
// Everything is in an unnamed namespace and calls no inline library function: a symbol shared
// with another source file could be linked in the version compiled for the newer processor.
//
// A policy has
//   at_once                        blocks that are multiplied together, at most kMostAtOnce; `count` below is
//                                  that, or fewer at the end of a row, and what is missing is 0
//   Codes, Lanes                   codes of so many blocks; `lanes` floats
//   load<W>(p, count), append<W>   codes from a plane of width W; (codes << W) | plane
//   store, load_stored             all codes as bytes; and back
//   Table, load_table, look_up     16 bytes; the byte of each code, codes of at most 4 bits
//   Tokens, load_tokens            activations of a token in the order of stored codes; from memory
//   dots<Wide>(codes, a, out)      for each row's codes and each token Lanes whose sum is
//                                  sum((codes - offset<Wide>) * a); codes fit 6 bits unless Wide
//   load_scales(p)                 p[i] in the lanes that dot gives to block i; `at_once` floats are read
//   zero, broadcast, load_floats, store_floats, multiply, multiply_add
//   sum(v, out)                    the sum of each of an array of Lanes, whatever else is in it
//   load_steps(word)               sizes of `lanes` steps of four bits each, from the lowest
//   direct_rows, direct_step       rows per tile of one token, read from the planes; and how many of them at a time
//   merges<First, Rest...>         whether such a tile reads planes of these widths, Rest of one bit, as Merged:
//     merge(planes, words, out)      those of one bit, all rows as one, 4 n words of a block, to 16 bytes each
//     load_merged<N>(p, merged, count, table)  the numbers, from a plane of width First and N of one bit merged
//   tile_rows, tile_tokens         tile of many tokens, read from unpacked codes
//   unpacked_rows                  rows that are unpacked at once and stay in the first cache
//   pairs                          whether whole tiles are multiplied two rows by two tokens; tile_tokens is 2 then,
//                                  tile_rows even, and there is more:
//   pair_rows<Wide>(a, b, out)     from stored codes of a block of two rows those in the order of pair_dots
//   TokenPair, load_token_pair     a block of two tokens in that order; from memory
//   pair_dots(a, b, tokens, out)   of two rows in that order and two tokens the four Lanes of `dots`, mixed
//   pair_scales(rows, tokens, pitch)  by what to multiply each of these; scales of rows and of tokens are pitch apart
//   part_pair(first, second)       Lanes of pair_dots, [2] and [2], become those of the rows with each token
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "activate.h"
#include "attend.h"
#include "fit.h"
#include "kernels.h"
#include "vectors.h"

#if defined(__GNUC__)
// GCC leaves a call in the innermost loop, and with it no vector in its register.
#define DYMOE_INLINE __attribute__((always_inline)) inline
#define DYMOE_INLINE_LAMBDA __attribute__((always_inline))
#else
#define DYMOE_INLINE inline
#define DYMOE_INLINE_LAMBDA
#endif
#if defined(__clang__)
#define DYMOE_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define DYMOE_UNROLL _Pragma("GCC unroll 16")
#else
#define DYMOE_UNROLL
#endif

namespace dymoe {
namespace {

constexpr int kNarrowBits = 6;
constexpr int64_t kAheadBlocks = 256;  // takes about as long to multiply as memory to answer

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

float row_scale(const MatrixView& m, int64_t row) {
  uint16_t high;
  std::memcpy(&high, m.multiplier + 2 * row, sizeof high);
  const uint32_t bits = uint32_t(high) << 16;
  float multiplier;
  std::memcpy(&multiplier, &bits, sizeof bits);
  return multiplier * m.levels.unit;
}

float step_size(const uint8_t* steps, int64_t block) {
  return kSteps[(steps[block / 2] >> (4 * (block % 2))) & 15];
}

template <int64_t Bytes>
DYMOE_INLINE void prefetch_bytes(const uint8_t* begin) {
#if defined(__GNUC__)
  DYMOE_UNROLL for (int64_t i = 0; i < Bytes; i += 64) __builtin_prefetch(begin + i);
#endif
}

/// Bytes of a row of stored codes.
template <class V>
constexpr int64_t stored_bytes(int64_t blocks) {
  return (blocks + V::at_once - 1) / V::at_once * V::at_once * kBlock;
}

// Sources of the numbers that codes stand for: `load(row, block, count)`.

/// The planes of a record, their widths known when compiling.
template <class V, int First, int... Rest>
struct Planes {
  static constexpr int count = 1 + sizeof...(Rest);
  static constexpr bool wide = (First + ... + Rest) > kNarrowBits;
  static constexpr bool looked_up = (First + ... + Rest) <= kMostCurved;

  int64_t blocks;
  const uint8_t* data[count];
  [[maybe_unused]] typename V::Table table;

  explicit Planes(const MatrixView& m) : blocks(m.blocks) {
    if constexpr (looked_up) table = V::load_table(m.levels.numbers);
    for (int i = 0; i < count; ++i) data[i] = m.plane[i].data;
  }

  static bool fits(const MatrixView& m) {
    constexpr int widths[] = {First, Rest...};
    if (m.planes != count) return false;
    for (int i = 0; i < count; ++i)
      if (m.plane[i].width != widths[i]) return false;
    return true;
  }

  DYMOE_INLINE typename V::Codes load(int64_t row, int64_t block, int64_t count) const {
    const int64_t at = 8 * (row * blocks + block);
    typename V::Codes codes = V::template load<First>(data[0] + at * First, count);
    [[maybe_unused]] int i = 1;
    ((codes = V::template append<Rest>(codes, data[i++] + at * Rest, count)), ...);
    if constexpr (looked_up) codes = V::look_up(codes, table);
    return codes;
  }

  /// Asks for `Count` blocks from number `block` of the matrix on; past its end does no harm. The
  /// processor's own prefetch stops at each page, and a page is only a few rows.
  template <int Count>
  DYMOE_INLINE void prefetch(int64_t block) const {
    prefetch_bytes<8 * Count * First>(data[0] + 8 * block * First);
    [[maybe_unused]] int i = 1;
    (prefetch_bytes<8 * Count * Rest>(data[i++] + 8 * block * Rest), ...);
  }
};

/// Planes of which those of one bit were merged to one of two bits, for the rows from `first` on. A tile is merged
/// before it is multiplied: both are long chains of steps, and a processor that looks ahead into the next blocks
/// sees more of them at once where each is short.
template <class V, class Source>
struct Merged {
  static constexpr bool wide = false;
  const Source& source;
  const uint8_t* merged;  // [rows, blocks, 16]
  int64_t first;

  DYMOE_INLINE typename V::Codes load(int64_t row, int64_t block, int64_t count) const {
    const int64_t at = row * source.blocks + block;
    return V::template load_merged<Source::count - 1>(source.data[0] + 16 * at,
                                                      merged + 16 * (at - first * source.blocks), count, source.table);
  }

  template <int Count>
  DYMOE_INLINE void prefetch(int64_t block) const {
    source.template prefetch<Count>(block);
  }
};

/// Calls `use` with a source of a tile's rows from `row` on.
template <class V, int First, int... Rest, class Use>
DYMOE_INLINE void read_tile(const Planes<V, First, Rest...>& source, int64_t row, uint8_t* scratch, Use use) {
  if constexpr (V::template merges<First, Rest...>) {
    static_assert(First == 2 && Planes<V, First, Rest...>::looked_up, "16 bytes a block");
    static_assert(V::direct_rows % 4 == 0, "merge takes four words at a time");
    constexpr int count = sizeof...(Rest);
    if constexpr (count > 0) {
      const uint8_t* planes[count];
      for (int i = 0; i < count; ++i) planes[i] = source.data[1 + i] + 8 * row * source.blocks;
      V::merge(planes, V::direct_rows * source.blocks, scratch);
    }
    use(Merged<V, Planes<V, First, Rest...>>{source, scratch, row});
  } else {
    use(source);
  }
}

/// Rows unpacked to one byte per number; row 0 is the first of them.
template <class V, bool Wide>
struct Unpacked {
  static constexpr bool wide = Wide;
  const uint8_t* codes;
  int64_t blocks;

  template <int Count>
  void prefetch(int64_t) const {}

  typename V::Codes load(int64_t row, int64_t block, int64_t) const {
    return V::load_stored(codes + row * stored_bytes<V>(blocks) + block * kBlock);
  }

  /// A block of a whole tile in pairs, [tile_rows, at_once * kBlock]: all of a tile at once, not row by row, so that
  /// its rows need one address. After the unpacked rows.
  const uint8_t* paired(int64_t row, int64_t block) const {
    return codes + (V::unpacked_rows + row) * stored_bytes<V>(blocks) + V::tile_rows * block * kBlock;
  }
};

template <class... Sources>
struct Splits {
  /// Calls `use` with the source whose widths are those of `m`; false if there is none.
  template <class Use>
  static bool visit(const MatrixView& m, Use use) {
    return ((Sources::fits(m) && (use(Sources(m)), true)) || ...);
  }
};

/// The splits compiled for themselves; any other is unpacked plane by plane.
template <class V>
using KnownSplits = Splits<Planes<V, 2>, Planes<V, 2, 1>, Planes<V, 2, 1, 1>, Planes<V, 2, 1, 1, 4>, Planes<V, 2, 2>,
                           Planes<V, 4>, Planes<V, 4, 2>, Planes<V, 8>>;

/// `dots` of a policy that has `dot` of one row and one token.
template <class V, bool Wide, int Rows, int Tokens>
DYMOE_INLINE void each_dot(const typename V::Codes (&codes)[Rows], const typename V::Tokens (&a)[Tokens],
                           typename V::Lanes (&out)[Rows][Tokens]) {
  DYMOE_UNROLL for (int t = 0; t < Tokens; ++t)
    DYMOE_UNROLL for (int r = 0; r < Rows; ++r) out[r][t] = V::template dot<Wide>(codes[r], a[t]);
}

/// The steps of `count` blocks from number `block` of a row on, four bits each from the lowest, 0 after them.
inline uint64_t read_steps(const MatrixView& m, int64_t row, int64_t block, int64_t count) {
  const int64_t at = row * step_bytes(m.blocks) + block / 2;
  uint64_t word = 0;
  if (at + int64_t(sizeof word) <= m.rows * step_bytes(m.blocks)) {
    std::memcpy(&word, m.steps + at, sizeof word);
  } else {
    for (int64_t i = 0; i < step_bytes(count); ++i) word |= uint64_t(m.steps[at + i]) << (8 * i);
  }
  static_assert(4 * kGroup == 8 * sizeof word, "a group's steps are one word");
  return count < kGroup ? word & ((uint64_t(1) << (4 * count)) - 1) : word;
}

/// The sizes of the steps of `count` rows, float [count, pitch]; 0 after the last block.
template <class V>
void load_sizes(const MatrixView& m, int64_t row, int64_t count, int64_t pitch, float* sizes) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t begin = 0; begin < m.blocks; begin += kGroup) {
      const uint64_t steps = read_steps(m, row + r, begin, smaller(kGroup, m.blocks - begin));
      float* out = sizes + r * pitch + begin;
      DYMOE_UNROLL for (int i = 0; i < kGroup; i += V::lanes) V::store_floats(out + i, V::load_steps(steps >> (4 * i)));
    }
  }
}

/// Adds a block of Rows rows and of two tokens to sums as V::pair_dots mixes them; pointers are to the block.
template <class V, int Rows>
DYMOE_INLINE void add_pairs(const uint8_t* rows, const int8_t* codes, int64_t codes_pitch, const float* sizes,
                            const float* scales, int64_t pitch, typename V::Lanes (&sums)[Rows][2]) {
  const typename V::TokenPair tokens = V::load_token_pair(codes, codes + codes_pitch);
  DYMOE_UNROLL for (int r = 0; r < Rows; r += 2) {
    const typename V::Lanes scale = V::pair_scales(sizes + r * pitch, scales, pitch);
    typename V::Lanes dots[4];
    const uint8_t* pair = rows + r * V::at_once * kBlock;
    V::pair_dots(V::load_stored(pair), V::load_stored(pair + V::at_once * kBlock), tokens, dots);
    DYMOE_UNROLL for (int i = 0; i < 4; ++i) {
      typename V::Lanes& sum = sums[r + i / 2][i % 2];
      sum = V::multiply_add(scale, dots[i], sum);
    }
  }
}

/// Whether a tile is multiplied in pairs.
template <class V, int Rows, int Tokens>
constexpr bool in_pairs = V::pairs && Rows == V::tile_rows && Tokens == V::tile_tokens;

/// y of Rows rows, from `row` on, and Tokens tokens, from `token` on; the codes are those of
/// rows `source_row` on of `source`, and `sizes` [Rows, pitch] those of their steps.
template <class V, int Rows, int Tokens, class Source>
void multiply_tile(const MatrixView& m, const Source& source, int64_t source_row, const float* sizes,
                   const Activations& a, int64_t row, int64_t token, float* y, int64_t stride) {
  using Lanes = typename V::Lanes;
  Lanes sums[Rows][Tokens], corrections[Rows][Tokens];
  DYMOE_UNROLL for (int r = 0; r < Rows; ++r)
    DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) sums[r][t] = corrections[r][t] = V::zero();
  const auto add = [&](int64_t block, int64_t count) DYMOE_INLINE_LAMBDA {
    if constexpr (in_pairs<V, Rows, Tokens>) {
      const int64_t pitch = codes_pitch(a.blocks);
      add_pairs<V, Rows>(source.paired(source_row, block), a.codes + token * pitch + block * kBlock, pitch,
                         sizes + block, a.scales + token * a.pitch + block, a.pitch, sums);
      return;
    }
    // Of one token as many rows at a time as registers hold.
    constexpr int Step = Tokens == 1 && Rows == V::direct_rows ? V::direct_step : Rows;
    DYMOE_UNROLL for (int first = 0; first < Rows; first += Step) {
      typename V::Codes codes[Step];
      typename V::Tokens tokens[Tokens];
      Lanes dots[Step][Tokens], scales[Step];
      DYMOE_UNROLL for (int r = 0; r < Step; ++r) {
        codes[r] = source.load(source_row + first + r, block, count);
        scales[r] = V::load_scales(sizes + (first + r) * a.pitch + block);
      }
      DYMOE_UNROLL for (int t = 0; t < Tokens; ++t)
        tokens[t] = V::load_tokens(a.codes + (token + t) * codes_pitch(a.blocks) + block * kBlock);
      V::template dots<Source::wide>(codes, tokens, dots);
      DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) {
        const Lanes scale = V::load_scales(a.scales + (token + t) * a.pitch + block);
        DYMOE_UNROLL for (int r = 0; r < Step; ++r)
          sums[first + r][t] = V::multiply_add(V::multiply(scales[r], scale), dots[r][t], sums[first + r][t]);
      }
    }
  };
  const int64_t ahead = (kAheadBlocks + m.blocks - 1) / m.blocks;
  int64_t block = 0;
  for (; block + V::at_once <= m.blocks; block += V::at_once) {
    // Each turn asks for as much of the rows ahead as it uses, for memory to be busy all the time.
    source.template prefetch<Rows * V::at_once>((source_row + ahead) * m.blocks + Rows * block);
    add(block, V::at_once);
  }
  if (block < m.blocks) add(block, m.blocks - block);
  if constexpr (in_pairs<V, Rows, Tokens>) {
    DYMOE_UNROLL for (int r = 0; r < Rows; r += 2) V::part_pair(sums[r], sums[r + 1]);
  }
  // A number is its level plus the centre, which is the same for all.
  const Lanes off_centre = V::broadcast(V::template offset<Source::wide> - m.levels.centre);
  for (int64_t i = 0; i < m.blocks; i += V::lanes) {
    Lanes own[Rows];
    DYMOE_UNROLL for (int r = 0; r < Rows; ++r) own[r] = V::load_floats(sizes + r * a.pitch + i);
    DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) {
      const Lanes of_token = V::load_floats(a.sums + (token + t) * a.pitch + i);
      DYMOE_UNROLL for (int r = 0; r < Rows; ++r)
        corrections[r][t] = V::multiply_add(own[r], of_token, corrections[r][t]);
    }
  }
  float row_scales[Rows];
  DYMOE_UNROLL for (int r = 0; r < Rows; ++r) row_scales[r] = row_scale(m, row + r);
  DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) {
    Lanes of_rows[Rows];
    DYMOE_UNROLL for (int r = 0; r < Rows; ++r)
      of_rows[r] = V::multiply_add(off_centre, corrections[r][t], sums[r][t]);
    float totals[Rows];
    V::sum(of_rows, totals);
    float* out = y + (token + t) * stride + row;
    DYMOE_UNROLL for (int r = 0; r < Rows; ++r) out[r] = totals[r] * row_scales[r];
  }
}

template <class V, class Source>
void multiply_one_token(const MatrixView& m, const Source& source, const Activations& a, int64_t begin, int64_t end,
                        float* y, int64_t stride, uint8_t* scratch, float* sizes) {
  int64_t row = begin;
  for (; row + V::direct_rows <= end; row += V::direct_rows) {
    prefetch_bytes<1>(m.steps + (row + V::direct_rows) * step_bytes(m.blocks));
    load_sizes<V>(m, row, V::direct_rows, a.pitch, sizes);
    read_tile(source, row, scratch, [&](const auto& rows) {
      multiply_tile<V, V::direct_rows, 1>(m, rows, row, sizes, a, row, 0, y, stride);
    });
  }
  for (; row < end; ++row) {
    load_sizes<V>(m, row, 1, a.pitch, sizes);
    multiply_tile<V, 1, 1>(m, source, row, sizes, a, row, 0, y, stride);
  }
}

/// `Tokens` tokens from `token` on times all `count` rows of a source, which are those of m from `row` on.
template <class V, int Tokens, class Source>
void multiply_rows(const MatrixView& m, const Source& source, int64_t count, const float* sizes, const Activations& a,
                   int64_t row, int64_t token, float* y, int64_t stride) {
  int64_t r = 0;
  for (; r + V::tile_rows <= count; r += V::tile_rows)
    multiply_tile<V, V::tile_rows, Tokens>(m, source, r, sizes + r * a.pitch, a, row + r, token, y, stride);
  for (; r < count; ++r)
    multiply_tile<V, 1, Tokens>(m, source, r, sizes + r * a.pitch, a, row + r, token, y, stride);
}

template <class V, int Width>
void append_plane(const uint8_t* plane, int64_t blocks, bool first, uint8_t* codes) {
  for (int64_t block = 0; block < blocks; block += V::at_once, plane += 8 * Width * V::at_once) {
    const int64_t count = smaller(V::at_once, blocks - block);
    uint8_t* to = codes + block * kBlock;
    V::store(to, first ? V::template load<Width>(plane, count)
                       : V::template append<Width>(V::load_stored(to), plane, count));
  }
}

/// Unpacks the numbers of a row of any split.
template <class V>
void unpack_planes(const MatrixView& m, int64_t row, uint8_t* codes) {
  for (int i = 0; i < m.planes; ++i) {
    const uint8_t* plane = m.plane[i].data + row * m.blocks * 8 * m.plane[i].width;
    switch (m.plane[i].width) {
      case 8: append_plane<V, 8>(plane, m.blocks, i == 0, codes); break;
      case 4: append_plane<V, 4>(plane, m.blocks, i == 0, codes); break;
      case 2: append_plane<V, 2>(plane, m.blocks, i == 0, codes); break;
      default: append_plane<V, 1>(plane, m.blocks, i == 0, codes); break;
    }
  }
  if (m.levels.numbers)
    for (int64_t i = 0; i < stored_bytes<V>(m.blocks); ++i) codes[i] = m.levels.numbers[codes[i]];
}

constexpr int64_t kAsked = 8;  // blocks whose plane of one bit is a cache line

/// Writes the numbers of `count` rows from `row` on, one byte each.
template <class V>
void unpack_rows(const MatrixView& m, int64_t row, int64_t count, uint8_t* codes) {
  const bool known = KnownSplits<V>::visit(m, [&](const auto& source) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t block = 0; block < m.blocks; block += V::at_once) {
        // The rows of the next call come while these are multiplied.
        if (block % kAsked == 0) source.template prefetch<kAsked>((row + r + V::unpacked_rows) * m.blocks + block);
        const int64_t rest = m.blocks - block;
        uint8_t* to = codes + r * stored_bytes<V>(m.blocks) + block * kBlock;
        V::store(to, rest >= V::at_once ? source.load(row + r, block, V::at_once) : source.load(row + r, block, rest));
      }
    }
  });
  if (known) return;
  for (int64_t r = 0; r < count; ++r) unpack_planes<V>(m, row + r, codes + r * stored_bytes<V>(m.blocks));
}

/// Writes whole tiles of the unpacked rows where `paired` finds them.
template <class V, bool Wide>
void pair_rows(int64_t count, int64_t blocks, uint8_t* codes) {
  static_assert(2 * V::unpacked_rows <= kScratchRows, "rows twice");
  constexpr int64_t bytes = V::at_once * kBlock;
  const int64_t pitch = stored_bytes<V>(blocks);
  uint8_t* tile = codes + V::unpacked_rows * pitch;
  for (int64_t row = 0; row + V::tile_rows <= count; row += V::tile_rows, tile += V::tile_rows * pitch)
    for (int r = 0; r < V::tile_rows; r += 2) {
      const uint8_t* from = codes + (row + r) * pitch;
      for (int64_t at = 0; at < pitch; at += bytes)
        V::template pair_rows<Wide>(from + at, from + pitch + at, tile + V::tile_rows * at + r * bytes);
    }
}

template <class V, bool Wide>
void multiply_unpacked(const MatrixView& m, const Activations& a, int64_t begin, int64_t end, float* y, int64_t stride,
                       uint8_t* codes, float* sizes) {
  static_assert(V::unpacked_rows % V::tile_rows == 0 && V::unpacked_rows <= kScratchRows, "whole tiles");
  const Unpacked<V, Wide> source{codes, m.blocks};
  for (int64_t row = begin; row < end; row += V::unpacked_rows) {
    const int64_t count = smaller(V::unpacked_rows, end - row);
    unpack_rows<V>(m, row, count, codes);
    load_sizes<V>(m, row, count, a.pitch, sizes);
    const bool pairs = V::pairs && a.tokens >= V::tile_tokens;
    if constexpr (V::pairs) {
      if (pairs) pair_rows<V, Wide>(count, m.blocks, codes);
    }
    // Rows within tokens: unpacked rows stay in the first cache, and tokens come there once for all of them.
    int64_t token = 0;
    for (; token + V::tile_tokens <= a.tokens; token += V::tile_tokens)
      multiply_rows<V, V::tile_tokens>(m, source, count, sizes, a, row, token, y, stride);
    if (pairs && token < a.tokens) {
      // Rows in pairs want tokens in pairs: the one before the last is multiplied again, to the same values.
      token = a.tokens - V::tile_tokens;
      multiply_rows<V, V::tile_tokens>(m, source, count, sizes, a, row, token, y, stride);
      continue;
    }
    for (; token < a.tokens; ++token) multiply_rows<V, 1>(m, source, count, sizes, a, row, token, y, stride);
  }
}

template <class V>
void product(const MatrixView& m, const Activations& a, int64_t begin, int64_t end, float* y, int64_t stride,
             uint8_t* scratch) {
  float* sizes = reinterpret_cast<float*>(scratch + kScratchRows * codes_pitch(m.blocks));
  const auto one_token = [&](const auto& source) {
    multiply_one_token<V>(m, source, a, begin, end, y, stride, scratch, sizes);
  };
  if (a.tokens == 1 && KnownSplits<V>::visit(m, one_token)) return;
  if (m.bits > kNarrowBits) {
    multiply_unpacked<V, true>(m, a, begin, end, y, stride, scratch, sizes);
  } else {
    multiply_unpacked<V, false>(m, a, begin, end, y, stride, scratch, sizes);
  }
}

/// Largest magnitude of 64 floats as its bits, which order like magnitudes, with NaN on top.
uint32_t peak_bits(const float* x) {
  uint32_t bits[kBlock], peak = 0;
  std::memcpy(bits, x, sizeof bits);
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffffffu;
    peak = magnitude > peak ? magnitude : peak;
  }
  return peak;
}

/// Rounds x * inverse to nearest even, and returns the sum.
int32_t round_block(const float* __restrict x, float inverse, int8_t* __restrict codes) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the low bits of (v + kRound) hold round(v)
  constexpr int32_t kRoundBits = 0x4b400000;
  float shifted[kBlock];
  int32_t bits[kBlock], sum = 0;
  for (int i = 0; i < kBlock; ++i) shifted[i] = x[i] * inverse + kRound;
  std::memcpy(bits, shifted, sizeof bits);
  for (int i = 0; i < kBlock; ++i) {
    codes[i] = int8_t(bits[i] - kRoundBits);
    sum += bits[i] - kRoundBits;
  }
  return sum;
}

void quantize_block(const float* x, int8_t* codes, float* scale, float* sum) {
  const uint32_t bits = peak_bits(x);
  float peak;
  std::memcpy(&peak, &bits, sizeof peak);
  const float inverse = 127.0f / peak;
  const bool finite = bits < 0x7f800000u;
  // A peak whose inverse overflows is below 1e-36 and counts as 0.
  if (!finite || !(inverse <= FLT_MAX)) {
    std::memset(codes, 0, kBlock);
    *scale = finite ? 0.0f : NAN;
    *sum = 0.0f;
    return;
  }
  *scale = peak / 127.0f;
  *sum = float(round_block(x, inverse, codes));
}

template <class V>
void quantize(const float* x, int64_t cols, int64_t token, const Activations& out) {
  int8_t* codes = out.codes + token * codes_pitch(out.blocks);
  float* scales = out.scales + token * out.pitch;
  float* sums = out.sums + token * out.pitch;
  for (int64_t block = 0; block < out.blocks; ++block) {
    const float* from = x + block * kBlock;
    float padded[kBlock] = {};
    const int64_t count = smaller(kBlock, cols - block * kBlock);
    if (count < kBlock) from = static_cast<const float*>(std::memcpy(padded, from, count * sizeof(float)));
    int8_t quantized[kBlock];
    quantize_block(from, quantized, scales + block, sums + block);
    sums[block] *= scales[block];
    for (int64_t i = 0; i < kBlock; i += 16) std::memcpy(codes + place(V::at_once, block, i), quantized + i, 16);
  }
  for (int64_t block = out.blocks; block < out.pitch; ++block) scales[block] = sums[block] = 0.0f;
}

template <class V>
void dequantize(const MatrixView& m, int64_t row, float* out, uint8_t* scratch) {
  unpack_rows<V>(m, row, 1, scratch);
  const float middle = m.levels.centre;
  for (int64_t block = 0; block < m.blocks; ++block) {
    const float scale = row_scale(m, row) * step_size(m.steps + row * step_bytes(m.blocks), block);
    const int64_t end = smaller(m.cols, (block + 1) * kBlock);
    for (int64_t col = block * kBlock; col < end; ++col)
      out[col] = scale * (float(scratch[place(V::at_once, block, col % kBlock)]) - middle);
  }
}

template <class V>
constexpr Kernels make_kernels(const char* name) {
  return {name, V::at_once,   kTileRows, quantize<V>, product<V>,  activate, dequantize<V>, norm,
          dots, exponentials, pack_row,  attend,      attend_tile, descend,  fit_rows};
}

}  // namespace
}  // namespace dymoe

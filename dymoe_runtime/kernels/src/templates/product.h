// The kernels, written once over a policy V. An instruction set is a policy for each grid and a call of `make_kernels`.
//
// Everything is in an unnamed namespace and calls no inline library function. Otherwise the linker could take the
// version of a shared symbol that was compiled for a newer processor.
//
// A policy has
//   at_once                        blocks that are multiplied together, at most kMaxAtOnce. `count` below is at_once,
//                                  or fewer at the end of a row; missing blocks are 0
//   Codes, Lanes                   the codes of at_once blocks; `lanes` floats
//   load<W>(p, count)              the codes of a plane of width W
//   append<W>(codes, p, count)     (codes << W) | plane
//   store, load_stored             write codes as bytes, and read them again
//   Table, load_table, look_up     a table of 16 bytes; replace each code, of at most 4 bits, by its byte of the table
//   Tokens, load_tokens            one token's activations in the order of stored codes; read them from memory
//   dots<Wide>(codes, a, out)      for each row's codes and each token, Lanes whose sum is
//                                  sum((codes - offset<Wide>) * a); codes fit 6 bits unless Wide
//   load_scales(p)                 p[i] in the lanes that `dots` gives to block i; at_once floats are read
//   zero, broadcast, load_floats, store_floats, multiply, multiply_add
//   sum(v, out)                    the sum of each Lanes of an array; does not depend on the other Lanes
//   load_scale_sizes(sizes, word)  those of sizes[16] that `lanes` indices of four bits ask for, from the lowest on
//   folds                          whether products add up each block in whole numbers, to one lane of floats: then a
//                                  scale is applied once to V::lanes blocks, not to each at_once. See below
//   scales                         scales of a block: 1, or 2 if each half has its own. Then `dots` keeps the halves in
//                                  different lanes, and a policy also has:
//   load_half_scales(p)            p[2 i] and p[2 i + 1] in the lanes of the first and the second half of block i
//   direct_rows, direct_step       rows of a tile for few tokens, read from the planes; how many are read together
//   direct_tokens, direct_most<Wide>  tokens of such a tile, 1 or 2; up to how many tokens planes are read for each
//                                  tile, because unpacking takes longer
//   merges<First, Rest...>         whether such a tile reads planes of these widths as Merged; then Rest are all 1:
//     merge(planes, words, out)      merges all planes of width 1 for `words` blocks, a multiple of 4; 16 bytes a block
//     load_merged<N>(p, merged, count, table)  the numbers by a plane of width First and N merged planes of width 1
//   tile_rows, tile_tokens         rows and tokens of a tile for many tokens, read from unpacked codes
//   unpacked_rows                  rows that are unpacked together and stay in the L1 cache
//   pairs                          whether such tiles are multiplied two rows by two tokens. Then tile_tokens is 2,
//                                  tile_rows is even, and a policy also has:
//   pair_rows<Wide>(a, b, out)     the stored codes of a block of two rows, in the order of pair_dots
//   TokenPair, load_token_pair     a block of two tokens in the order of pair_dots; read it from memory
//   pair_dots(a, b, tokens, out)   four Lanes for two rows and two tokens, with the products mixed. A policy that folds
//   or pair_dot(rows, tokens)      has the Lanes of one block instead: one for each row and token
//   pair_scales(rows, row_pitch, tokens, pitch)  the factors of such Lanes; scales of rows are row_pitch apart, those
//                                  of tokens pitch. With two scales, the first two Lanes are those of the first halves
//   part_pair(first, second)       turns the summed Lanes of pair_dots, or of four blocks, [2] and [2], into those of
//                                  each row and token
//
// A policy that folds has no `dots` and no `load_scales`, but
//   Sums, no_sums()                whole numbers: a register of sums, a few for each block
//   sum_products<Wide>(codes, a)   the Sums of a row and a token
//   add_adjacent(a, b)             folds Sums: adds adjacent lanes of a, then those of b. What has been folded twice
//                                  has one lane for each of V::lanes blocks, see `folded_block`
//   load_folded_sizes(sizes, word) load_scale_sizes in the order of these lanes
//   folded_together                1 or 2: how many times at_once blocks are read before their Sums are kept in memory,
//                                  where codes are not reordered
//   folded_from, unfolded_tokens   fewest tokens for which rows are reordered by fold_row; tokens of a tile for fewer
//   fold_row(from, blocks, to)     reorders the stored codes of a row or of a token. Where products of V::lanes blocks
//                                  are added up register by register, each lane then has the sum of one block. At the
//                                  end of a row, `folded_blocks` takes the place of V::lanes. `from` may be `to`
//   folded_step<Wide>, Folds       bytes of such codes that are multiplied together, and their registers
//   load_folded_row<Wide>(p), load_folded_token<Wide>(p), add_products<Wide>(row, token, sums)
//   hold(sums)                     tells the compiler to have an array of Sums in registers at this place
//   to_lanes(sums)                 the Lanes of the Sums of V::lanes blocks
//   transposes                     whether tokens are quantized side by side too, see Activations. Then also
//     transposed_from                the fewest tokens that are multiplied so
//     multiply_transposed(m, a, row, count, sizes, y, stride, codes)  multiplies all tokens by `count` unpacked rows;
//                                  the first is number `row` of m. May change `codes`
//   fold_rest(sums, count, before) Sums in the order of folded lanes, from those of the last `count` blocks of a row;
//                                  `before` is the number of blocks before them in these lanes
#pragma once

#include <cstring>

#include "descent/fit.h"
#include "descent/trellis.h"
#include "kernels.h"
#include "templates/activate.h"
#include "templates/attend.h"
#include "templates/delta.h"
#include "templates/quantize.h"
#include "templates/sources.h"
#include "templates/symbols.h"
#include "templates/vectors.h"

namespace dymoe {
namespace {

constexpr int64_t kAheadBlocks = 512;  // multiplying as many takes longer than memory to answer

/// Returns the multiplier of a row times the unit of the tier.
float row_scale(const MatrixView& m, int64_t row) {
  uint16_t high;
  std::memcpy(&high, m.multiplier + 2 * row, sizeof high);
  const uint32_t bits = uint32_t(high) << 16;
  float multiplier;
  std::memcpy(&multiplier, &bits, sizeof bits);
  return multiplier * m.levels.unit;
}

/// Returns number `i` of the scale indices of a row.
int scale_index(const uint8_t* indices, int64_t i) { return (indices[i / 2] >> (4 * (i % 2))) & 15; }

/// The grid that a policy is for.
template <class V>
constexpr Grid grid_of = V::scales == 2 ? Grid::mxfp4 : Grid::usual;

/// Implements `dots` for a policy that has `dot` for one row and one token.
template <class V, bool Wide, int Rows, int Tokens>
DYMOE_INLINE void each_dot(const typename V::Codes (&codes)[Rows], const typename V::Tokens (&a)[Tokens],
                           typename V::Lanes (&out)[Rows][Tokens]) {
  DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) DYMOE_UNROLL for (int r = 0; r < Rows; ++r) out[r][t] =
      V::template dot<Wide>(codes[r], a[t]);
}

/// Returns `count` scale indices of a row, whose indices take row_bytes, from number `first` on: four bits each, the
/// first in the lowest bits, 0 after the last.
inline uint64_t read_scale_indices(const MatrixView& m, int64_t row_bytes, int64_t row, int64_t first, int64_t count) {
  const int64_t at = row * row_bytes + first / 2;
  uint64_t word = 0;
  if (at + int64_t(sizeof word) <= m.rows * row_bytes) {
    std::memcpy(&word, m.scale_indices + at, sizeof word);
  } else {
    for (int64_t i = 0; i < scale_index_bytes(count); ++i) word |= uint64_t(m.scale_indices[at + i]) << (8 * i);
  }
  static_assert(4 * kGroup == 8 * sizeof word, "a group of scale indices is one word");
  return count < kGroup ? word & ((uint64_t(1) << (4 * count)) - 1) : word;
}

/// Returns those of sizes[16] that V::lanes indices of four bits ask for, in the order of folded lanes if V folds.
template <class V>
DYMOE_INLINE typename V::Lanes load_some_sizes(const float* sizes, uint64_t word) {
  if constexpr (V::folds) {
    return V::load_folded_sizes(sizes, word);
  } else {
    return V::load_scale_sizes(sizes, word);
  }
}

/// Reads the scale sizes of `count` rows into sizes [count, pitch, V::scales]; past the last block they are finite. If
/// V folds, those of V::lanes blocks are in the order of folded lanes.
template <class V>
void load_sizes(const MatrixView& m, int64_t row, int64_t count, int64_t pitch, float* sizes) {
  constexpr const float* table = V::scales == 2 ? kMxSizes : kScaleSizes;
  const int64_t all = V::scales * m.blocks, row_bytes = scale_index_bytes(m.blocks, grid_of<V>);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t begin = 0; begin < all; begin += kGroup) {
      const uint64_t indices = read_scale_indices(m, row_bytes, row + r, begin, smaller(kGroup, all - begin));
      float* out = sizes + r * V::scales * pitch + begin;
      DYMOE_UNROLL for (int i = 0; i < kGroup; i += V::lanes)
          V::store_floats(out + i, load_some_sizes<V>(table, indices >> (4 * i)));
    }
  }
}

template <class Source>
constexpr bool is_coded = false;
template <class V, int Further>
constexpr bool is_coded<Coded<V, Further>> = true;
template <class V, int Further, int Rows>
constexpr bool is_coded<CodedRows<V, Further, Rows>> = true;

template <class Source>
constexpr bool is_folded = false;
template <class V, bool Wide>
constexpr bool is_folded<Folded<V, Wide>> = true;

/// Reads the codes of `Step` rows of a tile, from its row number `from` on; `row` is the number of its first row.
template <class V, int Step, class Source>
DYMOE_INLINE void load_codes(const Source& source, int64_t row, int from, int64_t block, int64_t count,
                             typename V::Codes (&codes)[Step]) {
  if constexpr (is_coded<Source>) {
    source.template load_rows<Step>(from, block, count, codes);
  } else {
    DYMOE_UNROLL for (int r = 0; r < Step; ++r) codes[r] = source.load(row + from + r, block, count);
  }
}

/// The rows of a tile from planes that are read together, as many as the registers hold.
template <class V, class Source>
constexpr int step_of = V::direct_step;
/// Further planes hold two rows each; with two of them, tables leave registers for no more rows.
template <class V, int Further, int Rows>
constexpr int step_of<V, CodedRows<V, Further, Rows>> = Rows == 1                           ? 1
                                                        : V::direct_step > 1 && Further < 2 ? V::direct_step
                                                        : Further > 0                       ? 2
                                                                                            : 1;

/// Whether a tile of this shape is multiplied in pairs.
template <class V, int Rows, int Tokens>
constexpr bool in_pairs = V::pairs && Rows == V::tile_rows && Tokens == V::tile_tokens;

/// Returns the scale sizes of at_once blocks of a row in the lanes that `dots` gives to them.
template <class V>
DYMOE_INLINE typename V::Lanes load_row_scales(const float* sizes) {
  if constexpr (V::scales == 2) {
    return V::load_half_scales(sizes);
  } else {
    return V::load_scales(sizes);
  }
}

/// A tile: rows of a source from `source_row` on, of `blocks` blocks each, with their scale sizes
/// [rows, a.pitch, V::scales], and the tokens of `a` from `token` on.
struct TileView {
  int64_t source_row, blocks;
  const float* sizes;
  const Activations& a;
  int64_t token;
  int64_t token_pitch = codes_pitch(a.blocks);

  const int8_t* codes(int64_t block) const { return a.codes + token * token_pitch + block * kBlock; }
  const float* scales(int64_t block) const { return a.scales + kCopies * (token * a.pitch + block); }
};

/// The rows of a tile that are read together.
template <class V, int Rows, int Tokens, class Source>
constexpr int rows_at_once = Tokens <= V::direct_tokens && Rows == V::direct_rows ? step_of<V, Source> : Rows;

/// Reads `count` blocks of Step rows, from number `first` of the tile's Rows rows on, and of the tokens.
template <class V, int Rows, int Step, int Tokens, class Source>
DYMOE_INLINE void read_blocks(const Source& source, const TileView& tile, int first, int64_t block, int64_t count,
                              typename V::Codes (&codes)[Step], typename V::Tokens (&tokens)[Tokens]) {
  // Each step prefetches as much of the rows ahead as it uses, in whole cache lines. So memory is always busy.
  constexpr int Asked = Step * V::at_once >= kAsked ? Step : Rows;
  const int64_t ahead = (tile.source_row + (kAheadBlocks + tile.blocks - 1) / tile.blocks) * tile.blocks;
  if (first % Asked == 0) source.template prefetch<Asked * V::at_once>(ahead + Rows * block + first * V::at_once);
  load_codes<V>(source, tile.source_row, first, block, count, codes);
  DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) tokens[t] = V::load_tokens(tile.codes(block) + t * tile.token_pitch);
}

/// Adds the products of one block of a tile to `sums` as V::part_pair takes them: those of a pair of rows are in
/// four Lanes, of which `lane` is the one for the block if V folds.
template <class V, int Rows, class Source>
DYMOE_INLINE void add_pairs(const Source& source, const TileView& tile, int64_t block, [[maybe_unused]] int lane,
                            typename V::Lanes (&sums)[Rows][2]) {
  const int64_t pitch = tile.a.pitch;
  const uint8_t* rows = source.paired(tile.source_row, block);
  const float *sizes = tile.sizes + V::scales * block, *scales = tile.scales(block);
  const int8_t* codes = tile.codes(block);
  const typename V::TokenPair tokens = V::load_token_pair(codes, codes + tile.token_pitch);
  DYMOE_UNROLL for (int r = 0; r < Rows; r += 2) {
    typename V::Lanes scale[V::scales];
    DYMOE_UNROLL for (int h = 0; h < V::scales; ++h) scale[h] =
        V::pair_scales(sizes + r * V::scales * pitch + h, V::scales * pitch, scales, kCopies * pitch);
    const uint8_t* pair = rows + r * V::at_once * kBlock;
    if constexpr (V::folds) {
      typename V::Lanes& sum = sums[r + lane / 2][lane % 2];
      sum = V::multiply_add(scale[0], V::pair_dot(pair, tokens), sum);
    } else {
      typename V::Lanes dots[4];
      V::pair_dots(V::load_stored(pair), V::load_stored(pair + V::at_once * kBlock), tokens, dots);
      DYMOE_UNROLL for (int i = 0; i < 4; ++i) {
        typename V::Lanes& sum = sums[r + i / 2][i % 2];
        sum = V::multiply_add(scale[i * V::scales / 4], dots[i], sum);
      }
    }
  }
}

/// `add_blocks` for a tile that is multiplied in pairs.
template <class V, int Rows, class Source>
DYMOE_INLINE void add_in_pairs(const Source& source, const TileView& tile, typename V::Lanes (&sums)[Rows][2]) {
  static_assert(V::at_once == 1, "a block at a time");
  int64_t block = 0;
  for (; block + V::lanes <= tile.blocks; block += V::lanes)
    DYMOE_UNROLL for (int i = 0; i < V::lanes; ++i) add_pairs<V>(source, tile, block + i, i, sums);
  DYMOE_UNROLL for (int i = 0; i < V::lanes - 1; ++i) if (block + i < tile.blocks)
      add_pairs<V>(source, tile, block + i, i, sums);
  DYMOE_UNROLL for (int r = 0; r < Rows; r += 2) V::part_pair(sums[r], sums[r + 1]);
}

/// Adds the products of a tile to `sums`, scaled, block by block.
template <class V, int Rows, int Tokens, class Source>
DYMOE_INLINE void add_blocks(const Source& source, const TileView& tile, typename V::Lanes (&sums)[Rows][Tokens]) {
  using Lanes = typename V::Lanes;
  const int64_t pitch = tile.a.pitch;
  const auto add = [&](int64_t block, int64_t count) DYMOE_INLINE_LAMBDA {
    constexpr int Step = rows_at_once<V, Rows, Tokens, Source>;
    DYMOE_UNROLL for (int first = 0; first < Rows; first += Step) {
      typename V::Codes codes[Step];
      typename V::Tokens tokens[Tokens];
      Lanes dots[Step][Tokens], scales[Step];
      read_blocks<V, Rows>(source, tile, first, block, count, codes, tokens);
      DYMOE_UNROLL for (int r = 0; r < Step; ++r) scales[r] =
          load_row_scales<V>(tile.sizes + ((first + r) * pitch + block) * V::scales);
      V::template dots<Source::wide>(codes, tokens, dots);
      DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) {
        const Lanes scale = V::load_floats(tile.scales(block) + kCopies * t * pitch);
        DYMOE_UNROLL for (int r = 0; r < Step; ++r) sums[first + r][t] =
            V::multiply_add(V::multiply(scales[r], scale), dots[r][t], sums[first + r][t]);
      }
    }
  };
  int64_t block = 0;
  for (; block + V::at_once <= tile.blocks; block += V::at_once) add(block, V::at_once);
  if (block < tile.blocks) add(block, tile.blocks - block);
}

/// Adds the folded products of V::lanes blocks from `block` on to `sums`, scaled; folded(r, t) returns their Lanes.
template <class V, int Rows, int Tokens, class Get>
DYMOE_INLINE void add_scaled(const TileView& tile, int64_t block, Get folded, typename V::Lanes (&sums)[Rows][Tokens]) {
  const int64_t pitch = tile.a.pitch;
  const float* scales = tile.a.folded_scales + tile.token * pitch + block;
  DYMOE_UNROLL for (int r = 0; r < Rows; ++r) {
    const typename V::Lanes own = V::load_floats(tile.sizes + r * pitch + block);
    DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) sums[r][t] =
        V::multiply_add(V::multiply(own, V::load_floats(scales + t * pitch)), folded(r, t), sums[r][t]);
  }
}

/// Adds up the products of a tile in Sums, from block `block` on: `count` blocks of rows from number `first` on.
template <class V, int Rows, int Step, int Tokens, class Source>
DYMOE_INLINE void sum_blocks(const Source& source, const TileView& tile, int first, int64_t block, int64_t count,
                             typename V::Sums (&sums)[Step][Tokens]) {
  typename V::Codes codes[Step];
  typename V::Tokens tokens[Tokens];
  read_blocks<V, Rows>(source, tile, first, block, count, codes, tokens);
  DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) DYMOE_UNROLL for (int r = 0; r < Step; ++r) sums[r][t] =
      V::template sum_products<Source::wide>(codes[r], tokens[t]);
}

/// `add_blocks` for a policy that folds. Sums of V::lanes blocks wait in memory until they can be folded.
template <class V, int Rows, int Tokens, class Source>
DYMOE_INLINE void add_and_fold(const Source& source, const TileView& tile, typename V::Lanes (&sums)[Rows][Tokens]) {
  using Sums = typename V::Sums;
  static_assert(V::lanes == 4 * V::at_once, "a lane for each block that is folded twice");
  constexpr int Together = V::folded_together, Parts = 4 / Together;
  constexpr int Most = Tokens > V::direct_tokens ? 2 : Rows;  // rows whose sums fit the registers
  constexpr int Step = smaller(Most, rows_at_once<V, Rows, Tokens, Source>);
  Sums parts[Rows][Tokens][Parts];
  int part = 0;
  // Reads `count` blocks, and `more` blocks after them.
  const auto take = [&](int64_t block, int64_t count, [[maybe_unused]] int64_t more) DYMOE_INLINE_LAMBDA {
    DYMOE_UNROLL for (int first = 0; first < Rows; first += Step) {
      Sums own[Step][Tokens];
      sum_blocks<V, Rows>(source, tile, first, block, count, own);
      if constexpr (Together == 2) {
        Sums next[Step][Tokens];
        if (more > 0) sum_blocks<V, Rows>(source, tile, first, block + count, more, next);
        DYMOE_UNROLL for (int r = 0; r < Step; ++r) DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) own[r][t] =
            V::add_adjacent(own[r][t], more > 0 ? next[r][t] : V::no_sums());
      }
      DYMOE_UNROLL for (int r = 0; r < Step; ++r) DYMOE_UNROLL for (int t = 0; t < Tokens; ++t)
          parts[first + r][t][part] = own[r][t];
    }
    ++part;
  };
  const auto fold = [&](int64_t begin) DYMOE_INLINE_LAMBDA {
    const auto folded = [&](int r, int t) DYMOE_INLINE_LAMBDA {
      const Sums(&own)[Parts] = parts[r][t];
      if constexpr (Together == 2) return V::to_lanes(V::add_adjacent(own[0], own[1]));
      return V::to_lanes(V::add_adjacent(V::add_adjacent(own[0], own[1]), V::add_adjacent(own[2], own[3])));
    };
    add_scaled<V>(tile, begin, folded, sums);
    part = 0;
  };
  constexpr int64_t Blocks = Together * V::at_once;
  int64_t block = 0;
  for (; block + Blocks <= tile.blocks; block += Blocks) {
    take(block, V::at_once, V::at_once);
    if (part == Parts) fold(block + Blocks - V::lanes);
  }
  if (const int64_t rest = tile.blocks - block; rest > 0) take(block, smaller(rest, V::at_once), rest - V::at_once);
  if (part == 0) return;
  for (; part < Parts; ++part)
    for (auto& row : parts)
      for (auto& token : row) token[part] = V::no_sums();
  fold(block / V::lanes * V::lanes);
}

/// Returns how many of the `rest` last blocks of a row are folded together.
template <class V>
constexpr int64_t folded_blocks(int64_t rest) {
  return rest > V::lanes - V::at_once ? V::lanes : rest > V::at_once ? V::lanes / 2 : V::at_once;
}

/// Adds the products of a tile of folded codes to `sums`, scaled. The result is that of `add_and_fold`.
template <class V, int Rows, int Tokens, bool Wide>
DYMOE_INLINE void add_folded(const Folded<V, Wide>& source, const TileView& tile,
                             typename V::Lanes (&sums)[Rows][Tokens]) {
  const int64_t rows_pitch = stored_bytes<V>(source.blocks), pitch = tile.token_pitch;
  const uint8_t* rows = source.row(tile.source_row);
  const int8_t* tokens = tile.a.folded_codes + tile.token * pitch;
  int64_t block = 0;
  const auto add = [&](int64_t count, bool whole) DYMOE_INLINE_LAMBDA {
    typename V::Sums dots[Rows][Tokens];
    DYMOE_UNROLL for (auto& row : dots) DYMOE_UNROLL for (auto& dot : row) dot = V::no_sums();
    for (int64_t at = block * kBlock, end = at + count * kBlock; at < end; at += V::template folded_step<Wide>) {
      typename V::Folds own[Rows];
      DYMOE_UNROLL for (int r = 0; r < Rows; ++r) own[r] =
          V::template load_folded_row<Wide>(rows + r * rows_pitch + at);
      DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) {
        const typename V::Folds token = V::template load_folded_token<Wide>(tokens + t * pitch + at);
        DYMOE_UNROLL for (int r = 0; r < Rows; ++r) dots[r][t] =
            V::template add_products<Wide>(own[r], token, dots[r][t]);
      }
      V::hold(dots);
    }
    const int64_t before = block % V::lanes;
    const auto folded = [&](int r, int t) DYMOE_INLINE_LAMBDA {
      return V::to_lanes(whole ? dots[r][t] : V::fold_rest(dots[r][t], count, before));
    };
    add_scaled<V>(tile, block - before, folded, sums);
    block += count;
  };
  while (block + V::lanes - V::at_once < tile.blocks) add(V::lanes, true);
  while (block < tile.blocks) add(folded_blocks<V>(tile.blocks - block), false);
}

/// Computes y for a tile, whose rows are those of m from `row` on.
template <class V, int Rows, int Tokens, class Source>
DYMOE_INLINE void multiply_tile(const MatrixView& m, const Source& source, int64_t source_row, const float* sizes,
                                const Activations& a, int64_t row, int64_t token, float* y, int64_t stride) {
  using Lanes = typename V::Lanes;
  Lanes sums[Rows][Tokens], corrections[Rows][Tokens];
  DYMOE_UNROLL for (int r = 0; r < Rows; ++r) DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) sums[r][t] =
      corrections[r][t] = V::zero();
  const TileView tile{source_row, m.blocks, sizes, a, token};
  if constexpr (is_folded<Source>) {
    add_folded<V>(source, tile, sums);
  } else if constexpr (in_pairs<V, Rows, Tokens>) {
    add_in_pairs<V>(source, tile, sums);
  } else if constexpr (V::folds) {
    add_and_fold<V>(source, tile, sums);
  } else {
    add_blocks<V>(source, tile, sums);
  }
  // level = number - centre. The centre adds centre * (sum of the activations) to each block, which is subtracted here.
  const Lanes off_centre = V::broadcast(V::template offset<Source::wide> - m.levels.centre);
  const float* token_sums = V::folds ? a.folded_sums : V::scales == 2 ? a.half_sums : a.sums;
  for (int64_t i = 0; i < V::scales * m.blocks; i += V::lanes) {
    Lanes own[Rows];
    DYMOE_UNROLL for (int r = 0; r < Rows; ++r) own[r] = V::load_floats(sizes + r * V::scales * a.pitch + i);
    DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) {
      const Lanes of_token = V::load_floats(token_sums + (token + t) * V::scales * a.pitch + i);
      DYMOE_UNROLL for (int r = 0; r < Rows; ++r) corrections[r][t] =
          V::multiply_add(own[r], of_token, corrections[r][t]);
    }
  }
  Lanes all[Tokens * Rows];
  DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) DYMOE_UNROLL for (int r = 0; r < Rows; ++r) all[t * Rows + r] =
      V::multiply_add(off_centre, corrections[r][t], sums[r][t]);
  float totals[Tokens * Rows];
  V::sum(all, totals);
  float scales[Rows];
  DYMOE_UNROLL for (int r = 0; r < Rows; ++r) scales[r] = row_scale(m, row + r);
  DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) {
    float* out = y + (token + t) * stride + row;
    for (int r = 0; r < Rows; ++r) out[r] = totals[t * Rows + r] * scales[r];
  }
}

/// `multiply_tile` as a function of its own. A tile that is read from planes needs all registers; inlined, it would
/// share them with what surrounds it.
template <class V, int Rows, int Tokens, class Source>
DYMOE_APART void multiply_planes(const MatrixView& m, const Source& source, const float* sizes, const Activations& a,
                                 int64_t row, int64_t token, float* y, int64_t stride) {
  multiply_tile<V, Rows, Tokens>(m, source, row, sizes, a, row, token, y, stride);
}

/// The source of a single row.
template <class Source>
const Source& single_row(const Source& source, int64_t) {
  return source;
}
template <class V, int Further>
CodedRows<V, Further, 1> single_row(const Coded<V, Further>& source, int64_t row) {
  return {source, row};
}

/// Calls `use` with a source for the V::direct_rows rows from `row` on.
template <class V, int Further, class Use>
DYMOE_INLINE void read_tile(const Coded<V, Further>& source, int64_t row, uint8_t*, Use use) {
  use(CodedRows<V, Further, V::direct_rows>(source, row));
}

/// Multiplies few tokens by rows [begin, end), read from the planes.
template <class V, class Source>
void multiply_directly(const MatrixView& m, const Source& source, const Activations& a, int64_t begin, int64_t end,
                       float* y, int64_t stride, uint8_t* scratch, float* sizes) {
  const auto multiply_one = [&](int64_t row) {
    load_sizes<V>(m, row, 1, a.pitch, sizes);
    const auto& one = single_row(source, row);
    for (int64_t token = 0; token < a.tokens; ++token)
      multiply_planes<V, 1, 1>(m, one, sizes, a, row, token, y, stride);
  };
  int64_t row = begin;
  if constexpr (is_coded<Source>) {
    for (; row < end && row % V::direct_rows; ++row) multiply_one(row);
  }
  for (; row + V::direct_rows <= end; row += V::direct_rows) {
    prefetch_bytes<1>(m.scale_indices + (row + V::direct_rows) * scale_index_bytes(m.blocks, grid_of<V>));
    load_sizes<V>(m, row, V::direct_rows, a.pitch, sizes);
    read_tile(source, row, scratch, [&](const auto& rows) {
      int64_t token = 0;
      if constexpr (V::direct_tokens == 2) {
        for (; token + 2 <= a.tokens; token += 2)
          multiply_planes<V, V::direct_rows, 2>(m, rows, sizes, a, row, token, y, stride);
      }
      for (; token < a.tokens; ++token) multiply_planes<V, V::direct_rows, 1>(m, rows, sizes, a, row, token, y, stride);
    });
  }
  for (; row < end; ++row) multiply_one(row);
}

/// Multiplies `Tokens` tokens from `token` on by all `count` rows of a source, which are the rows of m from `row` on.
template <class V, int Tokens, class Source>
void multiply_rows(const MatrixView& m, const Source& source, int64_t count, const float* sizes, const Activations& a,
                   int64_t row, int64_t token, float* y, int64_t stride) {
  int64_t r = 0;
  for (; r + V::tile_rows <= count; r += V::tile_rows)
    multiply_tile<V, V::tile_rows, Tokens>(m, source, r, sizes + r * V::scales * a.pitch, a, row + r, token, y, stride);
  for (; r < count; ++r)
    multiply_tile<V, 1, Tokens>(m, source, r, sizes + r * V::scales * a.pitch, a, row + r, token, y, stride);
}

/// Multiplies the tokens from `token` on likewise: `Tokens` at a time, then half as many.
template <class V, int Tokens, class Source>
void multiply_tokens(const MatrixView& m, const Source& source, int64_t count, const float* sizes, const Activations& a,
                     int64_t row, int64_t token, float* y, int64_t stride) {
  for (; token + Tokens <= a.tokens; token += Tokens)
    multiply_rows<V, Tokens>(m, source, count, sizes, a, row, token, y, stride);
  if (token == a.tokens) return;
  if constexpr (V::pairs) {
    // Paired rows need paired tokens: the token before the last is computed again, with the same values.
    if (token > 0) return multiply_rows<V, Tokens>(m, source, count, sizes, a, row, a.tokens - Tokens, y, stride);
  }
  if constexpr (Tokens > 1) multiply_tokens<V, Tokens / 2>(m, source, count, sizes, a, row, token, y, stride);
}

/// Writes the numbers of `count` rows from `row` on, one byte each.
template <class V>
void read_numbers(const MatrixView& m, int64_t row, int64_t count, const uint8_t* zeros, uint8_t* codes) {
  if constexpr (grid_of<V> == Grid::usual) {
    if (m.grid == Grid::trellis) return unpack_coded_rows<V>(m, row, count, zeros, codes);
  }
  unpack_rows<V>(m, row, count, codes);
}

/// Folds unpacked rows.
template <class V>
void fold_rows(int64_t count, int64_t blocks, uint8_t* codes) {
  for (int64_t r = 0; r < count; ++r, codes += stored_bytes<V>(blocks)) V::fold_row(codes, blocks, codes);
}

/// Returns a row of symbols that are 0, in the scratch memory of a product.
inline const uint8_t* zeros_in(const MatrixView& m, uint8_t* scratch) {
  uint8_t* zeros = scratch + kScratchRows * scratch_row_bytes(m.blocks);
  if (m.grid == Grid::trellis) std::memset(zeros, 0, symbol_bytes(m.blocks));
  return zeros;
}

/// Multiplies all tokens by the `count` rows of m from `row` on that have been unpacked to `codes`.
template <class V, bool Wide>
void multiply_codes(const MatrixView& m, const Activations& a, int64_t row, int64_t count, const float* sizes, float* y,
                    int64_t stride, uint8_t* codes) {
  const Unpacked<V, Wide> source{codes, m.blocks};
  if constexpr (transposing<V>) {
    if (a.transposed_codes && a.tokens >= V::transposed_from)
      return V::multiply_transposed(m, a, row, count, sizes, y, stride, codes);
  }
  if constexpr (V::folds && !V::pairs) {
    if (!a.folded_codes || a.tokens < V::folded_from)
      return multiply_tokens<V, V::unfolded_tokens>(m, source, count, sizes, a, row, 0, y, stride);
    fold_rows<V>(count, m.blocks, codes);
    multiply_tokens<V, V::tile_tokens>(m, Folded<V, Wide>{codes, m.blocks}, count, sizes, a, row, 0, y, stride);
  } else {
    if constexpr (V::pairs) {
      if (a.tokens >= V::tile_tokens) pair_rows<V, Wide>(count, m.blocks, codes);
    }
    multiply_tokens<V, V::tile_tokens>(m, source, count, sizes, a, row, 0, y, stride);
  }
}

/// Multiplies all tokens by rows [begin, end), a few unpacked rows at a time.
template <class V, bool Wide>
void multiply_unpacked(const MatrixView& m, const Activations& a, int64_t begin, int64_t end, float* y, int64_t stride,
                       uint8_t* codes, float* sizes, const uint8_t* zeros) {
  static_assert(V::unpacked_rows % V::tile_rows == 0 && V::unpacked_rows <= kScratchRows, "whole tiles");
  for (int64_t row = begin; row < end; row += V::unpacked_rows) {
    const int64_t count = smaller(V::unpacked_rows, end - row);
    read_numbers<V>(m, row, count, zeros, codes);
    load_sizes<V>(m, row, count, a.pitch, sizes);
    multiply_codes<V, Wide>(m, a, row, count, sizes, y, stride, codes);
  }
}

/// `product` for a matrix on the grid of the policy.
template <class V>
void product_on_grid(const MatrixView& m, const Activations& a, int64_t begin, int64_t end, float* y, int64_t stride,
                     uint8_t* scratch) {
  float* sizes = reinterpret_cast<float*>(scratch + kScratchRows * codes_pitch(m.blocks));
  const auto directly = [&](const auto& source) {
    multiply_directly<V>(m, source, a, begin, end, y, stride, scratch, sizes);
  };
  const uint8_t* zeros = zeros_in(m, scratch);
  if constexpr (grid_of<V> == Grid::usual) {
    if (m.grid == Grid::trellis) {
      const bool wide = coded_are_wide(m.bits);
      const int64_t most = wide ? V::template direct_most<true> : V::template direct_most<false>;
      if (a.tokens <= most) return visit_coded<V>(m, zeros, directly);
      if (wide) return multiply_unpacked<V, true>(m, a, begin, end, y, stride, scratch, sizes, zeros);
      return multiply_unpacked<V, false>(m, a, begin, end, y, stride, scratch, sizes, zeros);
    }
  }
  const bool wide = m.bits > kNarrowBits;
  const int64_t most = wide ? V::template direct_most<true> : V::template direct_most<false>;
  if (a.tokens <= most && KnownSplits<V>::visit(m, directly)) return;
  if constexpr (grid_of<V> == Grid::usual) {
    if (wide) return multiply_unpacked<V, true>(m, a, begin, end, y, stride, scratch, sizes, zeros);
  }
  multiply_unpacked<V, false>(m, a, begin, end, y, stride, scratch, sizes, zeros);
}

/// See Kernels::product.
template <class V, class Halved>
void product(const MatrixView& m, const Activations& a, int64_t begin, int64_t end, float* y, int64_t stride,
             uint8_t* scratch) {
  if (m.grid == grid_of<Halved>) return product_on_grid<Halved>(m, a, begin, end, y, stride, scratch);
  product_on_grid<V>(m, a, begin, end, y, stride, scratch);
}

/// See Kernels::dequantize.
template <class V>
void dequantize(const MatrixView& m, int64_t row, float* out, uint8_t* scratch) {
  read_numbers<V>(m, row, 1, zeros_in(m, scratch), scratch);
  const float middle = m.levels.centre, *sizes = m.grid == Grid::mxfp4 ? kMxSizes : kScaleSizes;
  const uint8_t* indices = m.scale_indices + row * scale_index_bytes(m.blocks, m.grid);
  const int64_t span = kBlock / scales_of_block(m.grid);
  for (int64_t begin = 0; begin < m.cols; begin += span) {
    const float scale = row_scale(m, row) * sizes[scale_index(indices, begin / span)];
    for (int64_t col = begin; col < smaller(m.cols, begin + span); ++col)
      out[col] = scale * (float(scratch[place(V::at_once, col / kBlock, col % kBlock)]) - middle);
  }
}

/// Returns the kernels of an instruction set by its policies; `Halved` is the one with two scales of a block.
template <class V, class Halved>
constexpr Kernels make_kernels(const char* name) {
  constexpr int64_t folds_from = [] {
    if constexpr (V::folds) return V::folded_from;
    return int64_t(0);
  }();
  constexpr int64_t transposes_from = [] {
    if constexpr (transposing<V>) return V::transposed_from;
    return int64_t(0);
  }();
  return {name,
          V::at_once,
          kTileRows,
          folds_from,
          transposes_from,
          quantize<V>,
          product<V, Halved>,
          activate,
          dequantize<V>,
          norm,
          layer_norm,
          dots,
          exponentials,
          pack_row,
          attend,
          attend_tile,
          convolve,
          delta,
          sizeof(TrellisGroup),
          descend,
          fit_rows};
}

}  // namespace
}  // namespace dymoe

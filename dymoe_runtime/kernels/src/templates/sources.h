// Sources of the numbers of a matrix's codes: the planes of a record, and rows unpacked from them.
//
// Everything is in an unnamed namespace. product.h says why, and what a policy V has.
#pragma once

#include <cstring>

#include "kernels.h"

#if defined(__GNUC__)
// Otherwise GCC leaves a call in the innermost loop, and no vector stays in its register.
#define DYMOE_INLINE __attribute__((always_inline)) inline
#define DYMOE_INLINE_LAMBDA __attribute__((always_inline))
#define DYMOE_APART __attribute__((noinline))
#else
#define DYMOE_INLINE inline
#define DYMOE_INLINE_LAMBDA
#define DYMOE_APART
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

constexpr int kNarrowBits = 6;  // most bits of codes that are multiplied without Wide

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/// Returns p, of which the compiler does not know the parts. On ARM, whose loads add only a constant to a register, it
/// would compute each address from the start of the array.
DYMOE_INLINE const uint8_t* anchored(const uint8_t* p) {
#if defined(__aarch64__)
  asm("" : "+r"(p));
#endif
  return p;
}

/// Prefetches `Bytes` bytes into the second level of the cache. The first has too few buffers for lines that memory has
/// not sent yet, and what is multiplied now needs them.
template <int64_t Bytes>
DYMOE_INLINE void prefetch_bytes(const uint8_t* begin) {
#if defined(__GNUC__)
  begin = anchored(begin);
  DYMOE_UNROLL for (int64_t i = 0; i < Bytes; i += 64) __builtin_prefetch(begin + i, 0, 2);
#endif
}

/// Returns the bytes of a row of stored codes.
template <class V>
constexpr int64_t stored_bytes(int64_t blocks) {
  return (blocks + V::at_once - 1) / V::at_once * V::at_once * kBlock;
}

/// Returns the block, of V::lanes blocks that are folded together, whose sum is in a lane; see product.h.
template <class V>
constexpr int64_t folded_block(int64_t lane) {
  constexpr int64_t parts = V::lanes / V::at_once;
  return lane % parts * V::at_once + lane / parts;
}

/// Whether a policy has tokens side by side; see product.h.
template <class V>
constexpr bool transposing = [] {
  if constexpr (V::folds) return V::transposes;
  return false;
}();

// A source has load(row, block, count), which returns the numbers of `count` blocks, and prefetch<Count>(block).

/// The planes of a matrix in a record, with widths that are known at compile time.
template <class V, int First, int... Rest>
struct Planes {
  static constexpr int count = 1 + sizeof...(Rest);
  static constexpr bool wide = (First + ... + Rest) > kNarrowBits;
  static constexpr bool looked_up = (First + ... + Rest) <= kMaxCurved;

  int64_t blocks;
  const uint8_t* data[count];
  [[maybe_unused]] typename V::Table table;

  explicit Planes(const MatrixView& m) : blocks(m.blocks) {
    if constexpr (looked_up) table = V::load_table(m.levels.numbers);
    for (int i = 0; i < count; ++i) data[i] = m.plane[i].data;
  }

  /// Returns whether the planes of m have these widths.
  static bool fits(const MatrixView& m) {
    constexpr int widths[] = {First, Rest...};
    if (m.planes != count) return false;
    for (int i = 0; i < count; ++i)
      if (m.plane[i].width != widths[i]) return false;
    return true;
  }

  DYMOE_INLINE typename V::Codes load(int64_t row, int64_t block, int64_t count) const {
    const int64_t at = 8 * (row * blocks + block);
    typename V::Codes codes = V::template load<First>(anchored(data[0] + at * First), count);
    [[maybe_unused]] int i = 1;
    ((codes = V::template append<Rest>(codes, anchored(data[i++] + at * Rest), count)), ...);
    if constexpr (looked_up) codes = V::look_up(codes, table);
    return codes;
  }

  /// Prefetches `Count` blocks from number `block` of the matrix on; blocks past its end do no harm. The processor's
  /// own prefetch stops at each page, and a page holds only a few rows.
  template <int Count>
  DYMOE_INLINE void prefetch(int64_t block) const {
    prefetch_bytes<8 * Count * First>(data[0] + 8 * block * First);
    [[maybe_unused]] int i = 1;
    (prefetch_bytes<8 * Count * Rest>(data[i++] + 8 * block * Rest), ...);
  }
};

/// Planes of which those of one bit have been merged into one of two bits, for the rows from `first` on. A tile is
/// merged before it is multiplied. Both are long chains of instructions, and out-of-order execution overlaps more
/// blocks if each chain is shorter.
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

/// Calls `use` with a source for the V::direct_rows rows from `row` on, whose planes are merged if V::merges says so.
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

/// Rows unpacked to one byte for each number; row 0 is the first unpacked row.
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

  /// Returns a block of a whole tile in pairs, [tile_rows, at_once * kBlock], which lies after the unpacked rows. The
  /// rows of the block are contiguous, so that one address is enough for all of them.
  const uint8_t* paired(int64_t row, int64_t block) const {
    return codes + (V::unpacked_rows + row) * stored_bytes<V>(blocks) + V::tile_rows * block * kBlock;
  }
};

/// Rows unpacked likewise and then folded by V::fold_row.
template <class V, bool Wide>
struct Folded {
  static constexpr bool wide = Wide;
  const uint8_t* codes;
  int64_t blocks;

  const uint8_t* row(int64_t row) const { return codes + row * stored_bytes<V>(blocks); }
};

/// The splits of codes into planes that have sources of their own.
template <class... Sources>
struct Splits {
  /// Calls `use` with the source that fits m. Returns false if none does.
  template <class Use>
  static bool visit(const MatrixView& m, Use use) {
    return ((Sources::fits(m) && (use(Sources(m)), true)) || ...);
  }
};

template <class V, int64_t Scales>
struct SplitsOf {
  using Known = Splits<Planes<V, 2>, Planes<V, 2, 1>, Planes<V, 2, 1, 1>, Planes<V, 2, 1, 1, 4>, Planes<V, 2, 2>,
                       Planes<V, 4>, Planes<V, 4, 2>, Planes<V, 8>>;
};

/// MXFP4 has four bits at most.
template <class V>
struct SplitsOf<V, 2> {
  using Known = Splits<Planes<V, 2>, Planes<V, 2, 1>, Planes<V, 2, 1, 1>, Planes<V, 2, 2>, Planes<V, 4>>;
};

/// The splits with compiled sources; any other is unpacked plane by plane.
template <class V>
using KnownSplits = typename SplitsOf<V, V::scales>::Known;

/// Appends a plane to the stored codes of a row, or makes them from it if it is the first.
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
      case 8:
        append_plane<V, 8>(plane, m.blocks, i == 0, codes);
        break;
      case 4:
        append_plane<V, 4>(plane, m.blocks, i == 0, codes);
        break;
      case 2:
        append_plane<V, 2>(plane, m.blocks, i == 0, codes);
        break;
      default:
        append_plane<V, 1>(plane, m.blocks, i == 0, codes);
        break;
    }
  }
  if (m.levels.numbers)
    for (int64_t i = 0; i < stored_bytes<V>(m.blocks); ++i) codes[i] = m.levels.numbers[codes[i]];
}

constexpr int64_t kAsked = 8;  // blocks of a prefetch: in a plane of one bit, one cache line

/// Writes the numbers of `count` rows from `row` on, one byte each.
template <class V>
void unpack_rows(const MatrixView& m, int64_t row, int64_t count, uint8_t* codes) {
  const bool known = KnownSplits<V>::visit(m, [&](const auto& source) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t block = 0; block < m.blocks; block += V::at_once) {
        // The rows of the next call arrive while those of this call are multiplied.
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

/// Writes whole tiles of the unpacked rows in pairs, where Unpacked::paired finds them.
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

}  // namespace
}  // namespace dymoe

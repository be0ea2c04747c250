// The source of the numbers of a matrix on the trellis grid; see tiers.py.
//
// A policy V has for it
//   Bytes                          the symbols of one row for at_once blocks, four to a byte
//   load_bytes(p, count)           read them; missing blocks are 0
//   exclusive_or(a, b), choose_bits<Mask>(a, b)   a ^ b; a where the bits of Mask are set, else b
//   low_nibbles(v), high_nibbles(v), shuffle(table, v), add_bytes(a, b), load_table16(p)
//   part(codes, k)                 piece k of Codes, as Bytes
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cstring>

#include "kernels.h"
#include "templates/sources.h"
#include "trellis_tables.h"

namespace dymoe {
namespace {

/// A table by entry, own + 4 * above, and the same by above + 4 * own.
template <class V>
struct TurnedTables {
  typename V::Bytes straight, turned;

  TurnedTables() = default;

  explicit TurnedTables(const uint8_t* table)
      : straight(V::load_table16(table)), turned(V::load_table16(turned_of(table).bytes)) {}

 private:
  struct Sixteen {
    uint8_t bytes[16];
  };
  static Sixteen turned_of(const uint8_t* table) {
    Sixteen out;
    for (int i = 0; i < 16; ++i) out.bytes[i] = table[i / 4 + 4 * (i % 4)];
    return out;
  }
};

/// The entries of one row of symbols. Pieces 0 and 2 are for straight tables, 1 and 3 for turned ones.
template <class V>
struct SymbolEntries {
  typename V::Bytes piece[4];

  /// The symbols above a place are in the neighbouring place of their bytes, because every second row is swapped.
  DYMOE_INLINE SymbolEntries(typename V::Bytes own, typename V::Bytes above) {
    const auto even = V::template choose_bits<0x33>(own, above), odd = V::template choose_bits<0x33>(above, own);
    piece[0] = V::low_nibbles(even), piece[1] = V::low_nibbles(odd);
    piece[2] = V::high_nibbles(even), piece[3] = V::high_nibbles(odd);
  }
};

/// Returns the numbers that entries ask for; `odd` says whether the row is swapped.
template <class V>
DYMOE_INLINE typename V::Codes numbers_of(const SymbolEntries<V>& entries, const TurnedTables<V>& tables, bool odd) {
  typename V::Codes codes;
  DYMOE_UNROLL for (int k = 0; k < 4; ++k) V::part(codes, k ^ int(odd)) =
      V::shuffle(k % 2 ? tables.turned : tables.straight, entries.piece[k]);
  return codes;
}

template <class V>
DYMOE_INLINE void add_numbers(const SymbolEntries<V>& entries, const TurnedTables<V>& tables, bool odd,
                              typename V::Codes& codes) {
  DYMOE_UNROLL for (int k = 0; k < 4; ++k) {
    auto& part = V::part(codes, k ^ int(odd));
    part = V::add_bytes(part, V::shuffle(k % 2 ? tables.turned : tables.straight, entries.piece[k]));
  }
}

/// Rows of symbols of one plane: those from `first` on, and the three above them, which are the last of the ring for
/// the first of a group, or zeros if a ring would be too short.
template <int Count>
struct SymbolRows {
  const uint8_t* row[Count + 3] = {};

  SymbolRows() = default;

  /// `group` rows form a group, of `all`.
  DYMOE_INLINE SymbolRows(const uint8_t* data, int64_t first, int64_t all, int64_t group, int64_t pitch,
                          const uint8_t* zeros) {
    const int64_t inside = first % group;
    data += first * pitch;
    DYMOE_UNROLL for (int i = 0; i < Count + 3; ++i) row[i] = data + (i - 3) * pitch;
    if (inside >= 3) return;
    const int64_t begin = first - inside, count = smaller(group, all - begin), ring = count / 2 * 2;
    for (int i = 0; inside + i < 3; ++i) row[i] = count < kTrellisRing ? zeros : row[i] + ring * pitch;
  }

  template <class V>
  DYMOE_INLINE SymbolEntries<V> entries(int i, int64_t block, int64_t count) const {
    const auto load = [&](const uint8_t* p) { return V::load_bytes(p + 16 * block, count); };
    return {load(row[i + 3]), V::exclusive_or(load(row[i + 2]), load(row[i]))};
  }
};

/// Whether the numbers of a tier have more than kNarrowBits bits.
constexpr bool coded_are_wide(int bits) { return bits > 4; }

/// A matrix on the trellis grid with `Further` planes after the first.
template <class V, int Further>
struct Coded {
  static constexpr bool wide = coded_are_wide(2 + Further);
  int64_t rows, blocks;
  const uint8_t* data[1 + Further];
  const uint8_t* zeros;  // as long as a row of symbols
  TurnedTables<V> first;
  struct Steps {
    TurnedTables<V> of_row[2];
  };
  Steps steps[Further > 0 ? Further : 1];

  Coded(const MatrixView& m, const uint8_t* zeros) : Coded(m, zeros, kTrellisSteps[m.bits - 2]) {}

  template <int Count>
  DYMOE_INLINE void prefetch(int64_t block) const {
    prefetch_bytes<16 * Count>(data[0] + 16 * block);
    DYMOE_UNROLL for (int i = 1; i <= Further; ++i) prefetch_bytes<8 * Count>(data[i] + 8 * block);
  }

 private:
  static Steps steps_of(const int8_t (&tables)[2][16]) {
    return {{TurnedTables<V>(reinterpret_cast<const uint8_t*>(tables[0])),
             TurnedTables<V>(reinterpret_cast<const uint8_t*>(tables[1]))}};
  }
  Coded(const MatrixView& m, const uint8_t* zeros, const int8_t (&tables)[kMaxTrellisPlanes - 1][2][16])
      : rows(m.rows), blocks(m.blocks), zeros(zeros), first(m.levels.numbers), steps{steps_of(tables[0])} {
    for (int i = 0; i <= Further; ++i) data[i] = m.plane[i].data;
    for (int i = 1; i < Further; ++i) steps[i] = steps_of(tables[i]);
  }
};

/// `Rows` rows of a coded matrix: one, or an even number from an even row on, of which the first is a multiple of 4.
template <class V, int Further, int Rows>
struct CodedRows {
  static constexpr bool wide = Coded<V, Further>::wide;
  static constexpr int kPairs = (Rows + 1) / 2;
  const Coded<V, Further>& source;
  int64_t begin;
  SymbolRows<Rows> first;
  struct Plane {
    SymbolRows<kPairs> rows;
  };
  Plane further[Further > 0 ? Further : 1];

  CodedRows(const Coded<V, Further>& source, int64_t row)
      : source(source),
        begin(row),
        first(source.data[0], row, source.rows, kTrellisRows, symbol_bytes(source.blocks), source.zeros),
        further{plane(Further > 0 ? 1 : 0)} {
    for (int i = 1; i < Further; ++i) further[i] = plane(i + 1);
  }

  /// Reads `Step` rows, from number `from` of these rows on.
  template <int Step>
  DYMOE_INLINE void load_rows(int from, int64_t block, int64_t count, typename V::Codes (&codes)[Step]) const {
    // A constant, unless the tile is a single row.
    const int64_t row = Rows == 1 ? begin : from;
    DYMOE_UNROLL for (int r = 0; r < Step; ++r) codes[r] =
        numbers_of<V>(first.template entries<V>(from + r, block, count), source.first, (row + r) % 2 == 1);
    DYMOE_UNROLL for (int i = 0; i < Further; ++i) {
      DYMOE_UNROLL for (int r = 0; r < Step; r += 2) {
        const bool odd = (row + r) / 2 % 2 == 1;
        const SymbolEntries<V> entries = further[i].rows.template entries<V>((from + r) / 2, block, count);
        add_numbers<V>(entries, source.steps[i].of_row[(row + r) % 2], odd, codes[r]);
        if constexpr (Step > 1) add_numbers<V>(entries, source.steps[i].of_row[1], odd, codes[r + 1]);
      }
    }
  }

  template <int Count>
  DYMOE_INLINE void prefetch(int64_t block) const {
    source.template prefetch<Count>(block);
  }

 private:
  Plane plane(int i) const {
    return {{source.data[i], begin / 2, (source.rows + 1) / 2, kTrellisRows / 2, symbol_bytes(source.blocks),
             source.zeros}};
  }
};

/// Calls `use` with the source that fits the tier of m.
template <class V, class Use>
void visit_coded(const MatrixView& m, const uint8_t* zeros, Use use) {
  static_assert(kMaxTrellis == 6, "a source for each tier");
  switch (m.bits) {
    case 2:
      return use(Coded<V, 0>(m, zeros));
    case 3:
      return use(Coded<V, 1>(m, zeros));
    case 4:
      return use(Coded<V, 2>(m, zeros));
    case 5:
      return use(Coded<V, 3>(m, zeros));
    default:
      return use(Coded<V, 4>(m, zeros));
  }
}

/// Writes the numbers of `Rows` coded rows from `row` on, one byte each.
template <class V, int Rows, int Further>
void unpack_coded(const Coded<V, Further>& source, int64_t row, uint8_t* codes) {
  constexpr int Step = Rows == 1 ? 1 : 2;
  const CodedRows<V, Further, Rows> rows(source, row);
  const int64_t pitch = stored_bytes<V>(source.blocks);
  for (int64_t block = 0; block < source.blocks; block += V::at_once) {
    // The rows of the next call arrive while those of this call are multiplied.
    if (block % kAsked == 0)
      DYMOE_UNROLL for (int r = 0; r < Rows; ++r)
          source.template prefetch<kAsked>((row + r + V::unpacked_rows) * source.blocks + block);
    const auto take = [&](int64_t count) DYMOE_INLINE_LAMBDA {
      DYMOE_UNROLL for (int r = 0; r < Rows; r += Step) {
        typename V::Codes read[Step];
        rows.template load_rows<Step>(r, block, count, read);
        DYMOE_UNROLL for (int i = 0; i < Step; ++i) V::store(codes + (r + i) * pitch + block * kBlock, read[i]);
      }
    };
    if (block + V::at_once <= source.blocks)
      take(V::at_once);
    else
      take(source.blocks - block);
  }
}

/// `unpack_rows` for a coded matrix.
template <class V>
void unpack_coded_rows(const MatrixView& m, int64_t row, int64_t count, const uint8_t* zeros, uint8_t* codes) {
  visit_coded<V>(m, zeros, [&](const auto& source) {
    const int64_t pitch = stored_bytes<V>(m.blocks), end = row + count;
    for (int64_t r = row; r < end;) {
      if (r % 4 == 0 && r + 4 <= end) {
        unpack_coded<V, 4>(source, r, codes + (r - row) * pitch);
        r += 4;
      } else {
        unpack_coded<V, 1>(source, r, codes + (r - row) * pitch);
        ++r;
      }
    }
  });
}

}  // namespace
}  // namespace dymoe

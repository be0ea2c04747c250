// Folding for policies whose registers hold pieces of 128 bits, one of each of at_once blocks; product.h says what
// folding is. Such a policy has
//   Bytes, load_register, store_register
//   unpack<Bits, High>(a, b)  the low or the high fields of Bits bits of a and b, in turn, in each piece
// and add_adjacent works piece by piece.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include "templates/sources.h"

namespace dymoe {
namespace {

/// See fold_row in product.h.
template <class V>
void fold_pieces(const uint8_t* from, int64_t blocks, uint8_t* to) {
  using Bytes = typename V::Bytes;
  constexpr int64_t kPiece = sizeof(Bytes), kStored = 4 * kPiece;  // bytes of a register and of at_once blocks
  static_assert(V::lanes == 4 * V::at_once && kStored == V::at_once * kBlock, "a lane for each of four times as many");
  const auto keep = [&](int64_t at, Bytes v) { V::store_register(to + at, v); };
  // Each register gets one 32-bit word of each of V::lanes blocks.
  for (; blocks > 3 * V::at_once; blocks -= V::lanes, from += 4 * kStored, to += 4 * kStored) {
    DYMOE_UNROLL for (int64_t at = 0; at < kStored; at += kPiece) {
      const Bytes a = V::load_register(from + at), b = V::load_register(from + kStored + at);
      const Bytes c = V::load_register(from + 2 * kStored + at), d = V::load_register(from + 3 * kStored + at);
      const Bytes ab = V::template unpack<32, false>(a, b), cd = V::template unpack<32, false>(c, d);
      keep(at, V::template unpack<64, false>(ab, cd)), keep(kStored + at, V::template unpack<64, true>(ab, cd));
      const Bytes high_ab = V::template unpack<32, true>(a, b), high_cd = V::template unpack<32, true>(c, d);
      keep(2 * kStored + at, V::template unpack<64, false>(high_ab, high_cd));
      keep(3 * kStored + at, V::template unpack<64, true>(high_ab, high_cd));
    }
  }
  // One 64-bit word of each of half as many blocks.
  if (blocks > V::at_once) {
    DYMOE_UNROLL for (int64_t at = 0; at < kStored; at += kPiece) {
      const Bytes a = V::load_register(from + at), b = V::load_register(from + kStored + at);
      keep(at, V::template unpack<64, false>(a, b)), keep(kStored + at, V::template unpack<64, true>(a, b));
    }
    blocks -= V::lanes / 2, from += 2 * kStored, to += 2 * kStored;
  }
  if (blocks > 0) V::store(to, V::load_stored(from));
}

/// See fold_rest in product.h. V::lanes / 2 blocks have two sums each, and V::at_once blocks have four.
template <class V>
typename V::Sums fold_few(typename V::Sums sums, int64_t count, int64_t before) {
  const typename V::Sums folded = V::add_adjacent(sums, V::no_sums());
  if (count > V::at_once) return folded;
  return before ? V::add_adjacent(V::no_sums(), folded) : V::add_adjacent(folded, V::no_sums());
}

}  // namespace
}  // namespace dymoe

// The policy of AVX2 and FMA; product.h says what a policy has.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <immintrin.h>

#include "templates/fold.h"
#include "templates/product.h"
#include "templates/sum.h"

namespace dymoe {
namespace {

struct Avx2 {
  // part[k] holds columns 16 k to 16 k + 15 of two blocks, one block in each half.
  struct Codes {
    __m256i part[4];
  };
  using Lanes = __m256;

  static constexpr int64_t at_once = 2, scales = 1;
  static constexpr int lanes = 8;
  static constexpr int direct_rows = 4, direct_step = 1, tile_rows = 2, tile_tokens = 4;
  static constexpr int direct_tokens = 2;
  template <bool Wide>
  static constexpr int direct_most = Wide ? 4 : 3;
  static constexpr bool pairs = false, folds = true, transposes = false;
  static constexpr int folded_together = 1;
  static constexpr int64_t folded_from = 4, unfolded_tokens = 1;
  static constexpr int64_t unpacked_rows = 8;
  // Not for exactly one plane of one bit: spreading its bits takes no longer than merging it.
  template <int First, int... Rest>
  static constexpr bool merges = First == 2 && sizeof...(Rest) != 1 && sizeof...(Rest) <= 2 && (... && (Rest == 1));
  template <bool Wide>
  static constexpr float offset = Wide ? 128.0f : 0.0f;

  static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  /// Return the low halves, or the high halves, of two vectors.
  static __m256i low_halves(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x20); }
  static __m256i high_halves(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x31); }

  template <int W>
  static Codes load(const uint8_t* p, int64_t count) {
    const __m256i zero = _mm256_setzero_si256();
    if constexpr (W == 8) {
      const __m256i a = load256(p), b = load256(p + 32);
      const __m256i c = count > 1 ? load256(p + 64) : zero, d = count > 1 ? load256(p + 96) : zero;
      return {{low_halves(a, c), high_halves(a, c), low_halves(b, d), high_halves(b, d)}};
    } else if constexpr (W == 4) {
      const __m256i a = load256(p), b = count > 1 ? load256(p + 32) : zero, mask = _mm256_set1_epi8(15);
      const __m256i even = low_halves(a, b), odd = high_halves(a, b);
      return {{_mm256_and_si256(even, mask), _mm256_and_si256(odd, mask),
               _mm256_and_si256(_mm256_srli_epi32(even, 4), mask), _mm256_and_si256(_mm256_srli_epi32(odd, 4), mask)}};
    } else if constexpr (W == 2) {
      const __m256i bytes = count > 1 ? load256(p) : _mm256_zextsi128_si256(load128(p)), mask = _mm256_set1_epi8(3);
      const auto shifted = [&](int bits) { return _mm256_and_si256(_mm256_srli_epi32(bytes, bits), mask); };
      return {{shifted(0), shifted(2), shifted(4), shifted(6)}};
    } else {
      Codes codes = spread_bits(p, count);
      for (__m256i& part : codes.part) part = _mm256_and_si256(part, _mm256_set1_epi8(1));
      return codes;
    }
  }

  /// Returns -1 in the columns whose bit is set, and 0 in the others.
  static Codes spread_bits(const uint8_t* p, int64_t count) {
    const __m128i words = count > 1 ? load128(p) : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m256i both = _mm256_broadcastsi128_si256(words);
    const __m256i bit_of = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0808080808080808, 0x0909090909090909);
    Codes bits;
    DYMOE_UNROLL for (int k = 0; k < 4; ++k) {
      const __m256i bytes = _mm256_shuffle_epi8(both, _mm256_add_epi8(byte_of, _mm256_set1_epi8(char(2 * k))));
      bits.part[k] = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of);
    }
    return bits;
  }

  template <int W>
  static Codes append(Codes codes, const uint8_t* p, int64_t count) {
    if constexpr (W == 1) {
      const Codes bits = spread_bits(p, count);
      DYMOE_UNROLL for (int k = 0; k < 4; ++k) codes.part[k] =
          _mm256_sub_epi8(_mm256_add_epi8(codes.part[k], codes.part[k]), bits.part[k]);
    } else {
      // Codes of at most 8 - W bits stay within their bytes when 32-bit lanes are shifted.
      const Codes bits = load<W>(p, count);
      DYMOE_UNROLL for (int k = 0; k < 4; ++k) codes.part[k] =
          _mm256_or_si256(_mm256_slli_epi32(codes.part[k], W), bits.part[k]);
    }
    return codes;
  }

  /// Shuffle tables from a nibble to the number of a code.
  struct Table {
    __m256i numbers;          // the code is the nibble
    __m256i of_low, of_high;  // the code is the lower, or the upper, two bits of the nibble
    __m256i of_three;         // the code is bits 3, 2 and 0 of the nibble
  };
  static Table load_table(const uint8_t* numbers) {
    const auto both = [](__m128i table) { return _mm256_broadcastsi128_si256(table); };
    const __m128i all = load128(numbers);
    const auto choose = [&](auto... codes) { return both(_mm_shuffle_epi8(all, _mm_setr_epi8(codes...))); };
    return {both(all), choose(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3),
            choose(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
            choose(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7)};
  }
  static __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi32(v, 4)); }
  static Codes look_up(Codes codes, const Table& table) {
    for (__m256i& part : codes.part) part = _mm256_shuffle_epi8(table.numbers, part);
    return codes;
  }

  /// Swaps the upper field of each pair of fields in x with the lower field of the pair in y; fields have Bits bits.
  template <int Bits>
  static void swap_fields(__m256i& x, __m256i& y) {
    const __m256i lower = _mm256_set1_epi8(Bits == 1 ? 0x55 : Bits == 2 ? 0x33 : 0x0f);
    const __m256i differ = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi32(x, Bits), y), lower);
    y = _mm256_xor_si256(y, differ);
    x = _mm256_xor_si256(x, _mm256_slli_epi32(differ, Bits));
  }

  /// Loads the 64-bit words of four blocks: blocks 0 and 2 into the low half, 1 and 3 into the high half. `order`
  /// shuffles the bytes of each half.
  static __m256i load_words(const uint8_t* p, __m128i order) {
    const __m256i middle = _mm256_broadcastsi128_si256(load128(p + 8));
    return _mm256_shuffle_epi8(_mm256_blend_epi32(load256(p), middle, 0x3c), _mm256_broadcastsi128_si256(order));
  }
  static void store_pairs(uint8_t* out, __m256i first, __m256i second) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), second);
  }

  /// Merges two planes of one bit into one of width 2. In a word, the upper three bits of a column's number say which
  /// byte holds the column, and the lower three bits say which bit. Each swap exchanges an upper bit for a lower one.
  static void merge(const uint8_t* const (&planes)[2], int64_t words, uint8_t* out) {
    const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    for (int64_t i = 0; i < words; i += 4) {
      __m256i odd = load_words(planes[0] + 8 * i, order), even = load_words(planes[1] + 8 * i, order);
      swap_fields<1>(even, odd);
      __m256i x = _mm256_unpacklo_epi8(even, odd), y = _mm256_unpackhi_epi8(even, odd);
      swap_fields<4>(x, y);
      even = _mm256_unpacklo_epi16(x, y), odd = _mm256_unpackhi_epi16(x, y);
      swap_fields<2>(even, odd);
      store_pairs(out + 16 * i, _mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd));
    }
  }

  template <int N>
  static Codes load_merged(const uint8_t* p, const uint8_t* merged, int64_t count, const Table& table) {
    const auto read = [&](const uint8_t* p) { return count > 1 ? load256(p) : _mm256_zextsi128_si256(load128(p)); };
    __m256i odd = read(p), even = odd;
    if constexpr (N > 0) even = read(merged), swap_fields<2>(even, odd);
    // A nibble holds the code of one column, or without planes of one bit the codes of two columns.
    const __m256i own = N == 2 ? table.numbers : table.of_three;
    const __m256i low = N == 0 ? table.of_low : own, high = N == 0 ? table.of_high : own;
    return {{_mm256_shuffle_epi8(low, low_nibbles(even)), _mm256_shuffle_epi8(high, low_nibbles(odd)),
             _mm256_shuffle_epi8(low, high_nibbles(even)), _mm256_shuffle_epi8(high, high_nibbles(odd))}};
  }

  using Bytes = __m256i;
  static Bytes load_bytes(const uint8_t* p, int64_t count) {
    return count > 1 ? load256(p) : _mm256_zextsi128_si256(load128(p));
  }
  static Bytes load_table16(const uint8_t* p) { return _mm256_broadcastsi128_si256(load128(p)); }
  static Bytes exclusive_or(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
  template <int Mask>
  static Bytes choose_bits(Bytes a, Bytes b) {
    return _mm256_xor_si256(b, _mm256_and_si256(_mm256_xor_si256(a, b), _mm256_set1_epi8(Mask)));
  }
  static Bytes shuffle(Bytes table, Bytes indices) { return _mm256_shuffle_epi8(table, indices); }
  static Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
  static Bytes& part(Codes& codes, int k) { return codes.part[k]; }
  static Bytes load_register(const uint8_t* p) { return load256(p); }
  static void store_register(uint8_t* p, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  template <int Bits, bool High>
  static Bytes unpack(Bytes a, Bytes b) {
    if constexpr (Bits == 32) return High ? _mm256_unpackhi_epi32(a, b) : _mm256_unpacklo_epi32(a, b);
    return High ? _mm256_unpackhi_epi64(a, b) : _mm256_unpacklo_epi64(a, b);
  }
  static Bytes add_adjacent(Bytes a, Bytes b) { return _mm256_hadd_epi32(a, b); }

  static void store(uint8_t* out, const Codes& codes) {
    for (int k = 0; k < 4; ++k) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * k), codes.part[k]);
  }
  static Codes load_stored(const void* p) {
    const uint8_t* bytes = static_cast<const uint8_t*>(p);
    return {{load256(bytes), load256(bytes + 32), load256(bytes + 64), load256(bytes + 96)}};
  }

  using Tokens = Codes;
  static Tokens load_tokens(const int8_t* p) { return load_stored(p); }
  static __m256i add_pairs(__m256i v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }

  /// Returns sums of two products (code - 128) * a, made as |c| * (a with the sign of c): at most 2 * 128 * 127 < 2^15.
  static __m256i signed_pairs(__m256i codes, __m256i a) {
    const __m256i centred = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(a, centred));
  }

  /// Four sums of each of two blocks, as `dots` of other policies, but whole numbers.
  using Sums = __m256i;
  static Sums no_sums() { return _mm256_setzero_si256(); }
  template <bool Wide>
  static Sums sum_products(const Codes& codes, const Tokens& a) {
    __m256i pairs[4];
    DYMOE_UNROLL for (int k = 0; k < 4; ++k) pairs[k] =
        Wide ? signed_pairs(codes.part[k], a.part[k]) : _mm256_maddubs_epi16(codes.part[k], a.part[k]);
    if constexpr (Wide) {
      DYMOE_UNROLL for (__m256i& sums : pairs) sums = add_pairs(sums);
      pairs[0] = _mm256_add_epi32(pairs[0], pairs[1]), pairs[2] = _mm256_add_epi32(pairs[2], pairs[3]);
      return _mm256_add_epi32(pairs[0], pairs[2]);
    } else {
      // Four products of 6-bit codes: at most 4 * 63 * 127 < 2^15.
      return _mm256_add_epi32(add_pairs(_mm256_add_epi16(pairs[0], pairs[1])),
                              add_pairs(_mm256_add_epi16(pairs[2], pairs[3])));
    }
  }

  /// Has the sums of a whole tile in registers at the end of each round of a loop. Without it, GCC copies them from
  /// register to register in each round, some by way of memory.
  template <int Rows, int Tokens>
  static void hold([[maybe_unused]] Sums (&v)[Rows][Tokens]) {
#if defined(__GNUC__)
    if constexpr (Rows == 2 && Tokens == 4)
      asm(""
          : "+x"(v[0][0]), "+x"(v[0][1]), "+x"(v[0][2]), "+x"(v[0][3]), "+x"(v[1][0]), "+x"(v[1][1]), "+x"(v[1][2]),
            "+x"(v[1][3]));
#endif
  }
  static Lanes to_lanes(Sums sums) { return _mm256_cvtepi32_ps(sums); }
  static Sums fold_rest(Sums sums, int64_t count, int64_t before) { return fold_few<Avx2>(sums, count, before); }
  static void fold_row(const uint8_t* from, int64_t blocks, uint8_t* to) { fold_pieces<Avx2>(from, blocks, to); }

  /// Bytes of folded codes that are multiplied together. A row of wide codes takes two registers for as many codes as
  /// others have in one: the centred codes and their magnitudes.
  template <bool Wide>
  static constexpr int64_t folded_step = Wide ? 32 : 64;
  struct Folds {
    __m256i part[2];
  };
  template <bool Wide>
  static Folds load_folded_row(const uint8_t* p) {
    if constexpr (Wide) {
      const __m256i centred = _mm256_xor_si256(load256(p), _mm256_set1_epi8(-128));
      return {{centred, _mm256_abs_epi8(centred)}};
    } else {
      return {{load256(p), load256(p + 32)}};
    }
  }
  template <bool Wide>
  static Folds load_folded_token(const int8_t* p) {
    return {{load256(p), Wide ? _mm256_setzero_si256() : load256(p + 32)}};
  }
  template <bool Wide>
  static Sums add_products(const Folds& row, const Folds& token, Sums sums) {
    if constexpr (Wide) {
      const __m256i a = _mm256_sign_epi8(token.part[0], row.part[0]);
      return _mm256_add_epi32(sums, add_pairs(_mm256_maddubs_epi16(row.part[1], a)));
    } else {
      const __m256i first = _mm256_maddubs_epi16(row.part[0], token.part[0]);
      const __m256i second = _mm256_maddubs_epi16(row.part[1], token.part[1]);
      return _mm256_add_epi32(sums, add_pairs(_mm256_add_epi16(first, second)));
    }
  }

  /// Returns sums over pieces First and First + 1, for codes of 6 bits.
  template <int First>
  static __m256i half_dot(const Codes& codes, const Tokens& a) {
    return add_pairs(_mm256_add_epi16(_mm256_maddubs_epi16(codes.part[First], a.part[First]),
                                      _mm256_maddubs_epi16(codes.part[First + 1], a.part[First + 1])));
  }

  static Lanes zero() { return _mm256_setzero_ps(); }
  static Lanes broadcast(float value) { return _mm256_set1_ps(value); }
  static Lanes load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static Lanes load_scale_sizes(const float* sizes, uint64_t word) {
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(int32_t(word)));
    const __m128i indices = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
    return choose_sizes(sizes, _mm256_cvtepu8_epi32(indices));
  }
  static Lanes choose_sizes(const float* sizes, __m256i index) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(sizes), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(sizes + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  /// The even blocks of eight first, then the odd ones.
  static Lanes load_folded_sizes(const float* sizes, uint64_t word) {
    const uint32_t low = uint32_t(word) & 0x0f0f0f0fu, high = uint32_t(word) >> 4 & 0x0f0f0f0fu;
    return choose_sizes(sizes, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(high) << 32 | int64_t(low))));
  }
  static void store_floats(float* p, Lanes v) { _mm256_storeu_ps(p, v); }
  static Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
  template <int Rows>
  static void sum(const Lanes (&v)[Rows], float (&out)[Rows]) {
    sum_eight(v, out);
  }
};

/// The first two of four lanes of a dot product are those of the first half of a block.
template <class Base>
struct Halved : Base {
  using typename Base::Codes, typename Base::Lanes;

  static constexpr int64_t scales = 2;
  static constexpr int tile_rows = 1;
  static constexpr bool folds = false;

  template <bool Wide>
  static Lanes dot(const Codes& codes, const Codes& a) {
    const __m256i first = Base::template half_dot<0>(codes, a), second = Base::template half_dot<2>(codes, a);
    const __m256i outer = _mm256_blend_epi32(first, second, 0xcc), inner = _mm256_alignr_epi8(second, first, 8);
    return _mm256_cvtepi32_ps(_mm256_add_epi32(outer, inner));
  }

  template <bool Wide, int Rows, int Tokens>
  static void dots(const Codes (&codes)[Rows], const Codes (&a)[Tokens], Lanes (&out)[Rows][Tokens]) {
    each_dot<Halved, Wide>(codes, a, out);
  }

  static Lanes load_half_scales(const float* p) {
    const __m256 both = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    return _mm256_permutevar_ps(both, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
  }
};

}  // namespace
}  // namespace dymoe

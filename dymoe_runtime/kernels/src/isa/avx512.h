// The policy of AVX-512 F, BW, DQ, VL and VNNI; product.h says what a policy has.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <immintrin.h>

#include "templates/fold.h"
#include "templates/product.h"
#include "templates/sum.h"

namespace dymoe {
namespace {

struct Avx512 {
  // part[k] holds columns 16 k to 16 k + 15 of four blocks, one block in each 128 bits.
  struct Codes {
    __m512i part[4];
  };
  using Lanes = __m512;

  static constexpr int64_t at_once = 4, scales = 1;
  static constexpr int lanes = 16;
  static constexpr int direct_rows = 8, direct_step = 2, tile_rows = 4, tile_tokens = 4;
  static constexpr int direct_tokens = 1;
  template <bool Wide>
  static constexpr int direct_most = 1;
  static constexpr bool pairs = false, folds = true, transposes = false;
  static constexpr int folded_together = 2;
  static constexpr int64_t folded_from = 4, unfolded_tokens = 2;
  static constexpr int64_t unpacked_rows = 16;
  template <int... Widths>
  static constexpr bool merges = false;
  template <bool Wide>
  static constexpr float offset = 0.0f;

  /// Loads 64 bytes, or the first nbytes and then zeros.
  static __m512i read(const uint8_t* p, int64_t nbytes) {
    if (nbytes >= 64) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi8(nbytes > 0 ? ~uint64_t(0) >> (64 - nbytes) : 0, p);
  }

  /// Returns two 128-bit lanes of a, then two of b. The base-4 digits of `Chosen`, lowest first, are their indices.
  template <int Chosen>
  static __m512i lanes_of(__m512i a, __m512i b) {
    return _mm512_shuffle_i32x4(a, b, Chosen);
  }

  template <int W>
  static Codes load(const uint8_t* p, int64_t count) {
    const int64_t nbytes = 8 * W * count;
    if constexpr (W == 8) {
      const __m512i a = read(p, nbytes), b = read(p + 64, nbytes - 64), c = read(p + 128, nbytes - 128),
                    d = read(p + 192, nbytes - 192);
      const __m512i ab_low = lanes_of<0x44>(a, b), ab_high = lanes_of<0xee>(a, b);
      const __m512i cd_low = lanes_of<0x44>(c, d), cd_high = lanes_of<0xee>(c, d);
      return {{lanes_of<0x88>(ab_low, cd_low), lanes_of<0xdd>(ab_low, cd_low), lanes_of<0x88>(ab_high, cd_high),
               lanes_of<0xdd>(ab_high, cd_high)}};
    } else if constexpr (W == 4) {
      const __m512i ab = read(p, nbytes), cd = read(p + 64, nbytes - 64), mask = _mm512_set1_epi8(15);
      const __m512i even = lanes_of<0x88>(ab, cd), odd = lanes_of<0xdd>(ab, cd);
      return {{_mm512_and_si512(even, mask), _mm512_and_si512(odd, mask),
               _mm512_and_si512(_mm512_srli_epi32(even, 4), mask), _mm512_and_si512(_mm512_srli_epi32(odd, 4), mask)}};
    } else if constexpr (W == 2) {
      const __m512i bytes = read(p, nbytes), mask = _mm512_set1_epi8(3);
      const auto shifted = [&](int bits) { return _mm512_and_si512(_mm512_srli_epi32(bytes, bits), mask); };
      return {{shifted(0), shifted(2), shifted(4), shifted(6)}};
    } else {
      Codes codes;
      const Masks masks(p, count);
      DYMOE_UNROLL for (int k = 0; k < 4; ++k) codes.part[k] = _mm512_maskz_set1_epi8(masks.of[k], 1);
      return codes;
    }
  }

  /// The bits of a plane of width 1 as one mask for each piece.
  struct Masks {
    alignas(32) uint64_t of[4];

    Masks(const uint8_t* p, int64_t count) {
      const __mmask8 valid = count >= 4 ? 15 : (1 << count) - 1;
      const __m256i words =
          count >= 4 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi64(valid, p);
      const __m256i by_piece = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      _mm256_store_si256(reinterpret_cast<__m256i*>(of), _mm256_permutexvar_epi16(by_piece, words));
    }
  };

  template <int W>
  static Codes append(Codes codes, const uint8_t* p, int64_t count) {
    if constexpr (W == 1) {
      const Masks masks(p, count);
      DYMOE_UNROLL for (int k = 0; k < 4; ++k) {
        const __m512i twice = _mm512_add_epi8(codes.part[k], codes.part[k]);
        codes.part[k] = _mm512_mask_sub_epi8(twice, masks.of[k], twice, _mm512_set1_epi8(-1));
      }
    } else {
      // Codes of at most 8 - W bits stay within their bytes when 32-bit lanes are shifted.
      const Codes bits = load<W>(p, count);
      DYMOE_UNROLL for (int k = 0; k < 4; ++k) codes.part[k] =
          _mm512_or_si512(_mm512_slli_epi32(codes.part[k], W), bits.part[k]);
    }
    return codes;
  }

  using Table = __m512i;
  static Table load_table(const uint8_t* numbers) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers)));
  }
  static Codes look_up(Codes codes, Table table) {
    DYMOE_UNROLL for (int k = 0; k < 4; ++k) codes.part[k] = _mm512_shuffle_epi8(table, codes.part[k]);
    return codes;
  }

  using Bytes = __m512i;
  static Bytes load_bytes(const uint8_t* p, int64_t count) { return read(p, 16 * count); }
  static Bytes load_table16(const uint8_t* p) { return load_table(p); }
  static Bytes exclusive_or(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
  template <int Mask>
  static Bytes choose_bits(Bytes a, Bytes b) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(Mask), a, b, 0xca);
  }
  static Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static Bytes high_nibbles(Bytes v) { return low_nibbles(_mm512_srli_epi32(v, 4)); }
  static Bytes shuffle(Bytes table, Bytes indices) { return _mm512_shuffle_epi8(table, indices); }
  static Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
  static Bytes& part(Codes& codes, int k) { return codes.part[k]; }
  static Bytes load_register(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_register(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
  template <int Bits, bool High>
  static Bytes unpack(Bytes a, Bytes b) {
    if constexpr (Bits == 32) return High ? _mm512_unpackhi_epi32(a, b) : _mm512_unpacklo_epi32(a, b);
    return High ? _mm512_unpackhi_epi64(a, b) : _mm512_unpacklo_epi64(a, b);
  }
  static Bytes add_adjacent(Bytes a, Bytes b) {
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
  }

  static void store(uint8_t* out, const Codes& codes) {
    DYMOE_UNROLL for (int k = 0; k < 4; ++k) _mm512_storeu_si512(out + 64 * k, codes.part[k]);
  }
  static Codes load_stored(const uint8_t* p) {
    return {
        {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64), _mm512_loadu_si512(p + 128), _mm512_loadu_si512(p + 192)}};
  }

  using Tokens = Codes;
  static Tokens load_tokens(const int8_t* p) { return load_stored(reinterpret_cast<const uint8_t*>(p)); }

  /// Four sums of each of four blocks.
  using Sums = __m512i;
  static Sums no_sums() { return _mm512_setzero_si512(); }
  template <bool Wide>
  static Sums sum_products(const Codes& codes, const Tokens& a) {
    Sums sums = no_sums();
    DYMOE_UNROLL for (int k = 0; k < 4; ++k) sums = _mm512_dpbusd_epi32(sums, codes.part[k], a.part[k]);
    return sums;
  }
  static Lanes to_lanes(Sums sums) { return _mm512_cvtepi32_ps(sums); }
  static Sums fold_rest(Sums sums, int64_t count, int64_t before) { return fold_few<Avx512>(sums, count, before); }
  static void fold_row(const uint8_t* from, int64_t blocks, uint8_t* to) { fold_pieces<Avx512>(from, blocks, to); }

  template <bool>
  static constexpr int64_t folded_step = 64;
  using Folds = __m512i;
  template <bool>
  static Folds load_folded_row(const uint8_t* p) {
    Folds row = _mm512_loadu_si512(p);
    keep(row);
    return row;
  }
  template <bool>
  static Folds load_folded_token(const int8_t* p) {
    Folds token = _mm512_loadu_si512(p);
    keep(token);
    return token;
  }
  template <bool>
  static Sums add_products(const Folds& row, const Folds& token, Sums sums) {
    return _mm512_dpbusd_epi32(sums, row, token);
  }
  template <int Rows, int Tokens>
  static void hold(Sums (&v)[Rows][Tokens]) {
    DYMOE_UNROLL for (int r = 0; r < Rows; ++r) DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) keep(v[r][t]);
  }

  /// Keeps a vector in its register; the compiler would read it from memory again.
  static void keep(__m512i& vector) { asm("" : "+v"(vector)); }

  static Lanes zero() { return _mm512_setzero_ps(); }
  static Lanes broadcast(float value) { return _mm512_set1_ps(value); }
  static Lanes load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static Lanes load_scale_sizes(const float* sizes, uint64_t word) {
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(int64_t(word)));
    const __m128i indices = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(indices), _mm512_load_ps(sizes));
  }
  static Lanes load_folded_sizes(const float* sizes, uint64_t word) {
    // Lane 4 i + j is block 4 j + i, whose index begins at bit 16 j + 4 i of the word.
    const __m128i halves = _mm_shuffle_epi32(_mm_cvtsi64_si128(int64_t(word)), 0x50);
    const __m512i shift = _mm512_setr_epi32(0, 16, 0, 16, 4, 20, 4, 20, 8, 24, 8, 24, 12, 28, 12, 28);
    // A permutation by floats heeds only the lower four bits of each index.
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_broadcast_i32x4(halves), shift), _mm512_load_ps(sizes));
  }
  static void store_floats(float* p, Lanes v) { _mm512_storeu_ps(p, v); }
  static Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
  template <int Rows>
  DYMOE_INLINE static void sum(const Lanes (&v)[Rows], float (&out)[Rows]) {
    __m256 halves[Rows];
    DYMOE_UNROLL for (int r = 0; r < Rows; ++r) halves[r] =
        _mm256_add_ps(_mm512_castps512_ps256(v[r]), _mm512_extractf32x8_ps(v[r], 1));
    sum_eight(halves, out);
  }
};

/// The first two of four lanes of a dot product are those of the first half of a block.
struct HalvedAvx512 : Avx512 {
  static constexpr int64_t scales = 2;
  static constexpr int tile_tokens = 2;
  static constexpr bool folds = false;

  /// Computes sums over pieces First to End - 1.
  template <int First, int End, int Rows, int Tokens>
  DYMOE_INLINE static void add_pieces(const Codes (&codes)[Rows], const Codes (&a)[Tokens],
                                      __m512i (&sums)[Rows][Tokens]) {
    DYMOE_UNROLL for (int r = 0; r < Rows; ++r) DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) sums[r][t] =
        _mm512_setzero_si512();
    // Piece by piece, so that successive products go to different sums and codes take few registers.
    DYMOE_UNROLL for (int k = First; k < End; ++k) {
      __m512i own[Rows];
      DYMOE_UNROLL for (int r = 0; r < Rows; ++r) {
        own[r] = codes[r].part[k];
        if (Tokens > 1) keep(own[r]);
      }
      DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) {
        __m512i token = a[t].part[k];
        if (Rows > 1) keep(token);
        DYMOE_UNROLL for (int r = 0; r < Rows; ++r) sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], own[r], token);
      }
    }
  }

  template <bool Wide, int Rows, int Tokens>
  DYMOE_INLINE static void dots(const Codes (&codes)[Rows], const Codes (&a)[Tokens], Lanes (&out)[Rows][Tokens]) {
    __m512i first[Rows][Tokens], second[Rows][Tokens];
    add_pieces<0, 2>(codes, a, first);
    add_pieces<2, 4>(codes, a, second);
    DYMOE_UNROLL for (int r = 0; r < Rows; ++r) DYMOE_UNROLL for (int t = 0; t < Tokens; ++t) {
      const __m512i outer = _mm512_mask_blend_epi32(0xcccc, first[r][t], second[r][t]);
      const __m512i inner = _mm512_alignr_epi8(second[r][t], first[r][t], 8);
      out[r][t] = _mm512_cvtepi32_ps(_mm512_add_epi32(outer, inner));
    }
  }

  static Lanes load_half_scales(const float* p) {
    const __m512i own_lane = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(own_lane, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
  }
};

}  // namespace
}  // namespace dymoe

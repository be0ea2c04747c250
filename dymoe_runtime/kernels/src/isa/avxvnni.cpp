// The kernels for AVX2 with AVX-VNNI (256-bit dot products) and GFNI (bit matrices). All with AVX-VNNI have GFNI.
#include "isa/avx2.h"
#include "isa/isa.h"

namespace dymoe {
namespace {

struct AvxVnni : Avx2 {
  template <int First, int... Rest>
  static constexpr bool merges = First == 2 && sizeof...(Rest) <= 2 && (... && (Rest == 1));

  /// Merges one or two planes of one bit into one of width 2; see Avx2. With one plane, the upper bit is undefined.
  template <int N>
  static void merge(const uint8_t* const (&planes)[N], int64_t words, uint8_t* out) {
    // Each word is an 8x8 bit matrix: bit i of byte j of the product is bit j of byte 7 - i of the word.
    const __m128i reversed = _mm_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8);
    const auto transposed = [&](const uint8_t* p) {
      return _mm256_gf2p8affine_epi64_epi8(_mm256_set1_epi64x(int64_t(0x8040201008040201)), load_words(p, reversed), 0);
    };
    for (int64_t i = 0; i < words; i += 4) {
      __m256i odd = transposed(planes[0] + 8 * i), even;
      if constexpr (N == 2) {
        even = transposed(planes[1] + 8 * i);
        swap_fields<1>(even, odd);
      } else {
        even = odd, odd = _mm256_srli_epi32(even, 1);
      }
      store_pairs(out + 16 * i, _mm256_unpacklo_epi64(even, odd), _mm256_unpackhi_epi64(even, odd));
    }
  }

  // The matrix moves bit i + 4 of each byte to bit i.
  static Bytes high_nibbles(Bytes v) {
    return _mm256_gf2p8affine_epi64_epi8(v, _mm256_set1_epi64x(int64_t(0x1020408000000000)), 0);
  }

  template <bool Wide>
  static constexpr float offset = 0.0f;

  /// Sums products of unsigned and signed bytes in 32 bits, so that even Wide codes need no offset.
  template <bool Wide>
  static Sums sum_products(const Codes& codes, const Tokens& a) {
    __m256i sums = no_sums();
    DYMOE_UNROLL for (int k = 0; k < 4; ++k) sums = _mm256_dpbusd_avx_epi32(sums, codes.part[k], a.part[k]);
    return sums;
  }

  template <bool>
  static constexpr int64_t folded_step = 64;
  template <bool>
  static Folds load_folded_row(const uint8_t* p) {
    return Avx2::load_folded_row<false>(p);
  }
  template <bool>
  static Folds load_folded_token(const int8_t* p) {
    return Avx2::load_folded_token<false>(p);
  }
  template <bool>
  static Sums add_products(const Folds& row, const Folds& token, Sums sums) {
    DYMOE_UNROLL for (int k = 0; k < 2; ++k) sums = _mm256_dpbusd_avx_epi32(sums, row.part[k], token.part[k]);
    return sums;
  }

  template <int First>
  static __m256i half_dot(const Codes& codes, const Tokens& a) {
    const __m256i sums = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes.part[First], a.part[First]);
    return _mm256_dpbusd_avx_epi32(sums, codes.part[First + 1], a.part[First + 1]);
  }
};

}  // namespace

const Kernels kAvxVnni = make_kernels<AvxVnni, Halved<AvxVnni>>("avxvnni");

}  // namespace dymoe

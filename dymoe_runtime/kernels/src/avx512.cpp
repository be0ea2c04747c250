// AVX-512 F, BW, DQ, VL and VNNI.
#include <immintrin.h>

#include "isa.h"
#include "product.h"

namespace dymoe {
namespace {

struct Avx512 {
  using Codes = __m512i;
  using Lanes = __m512;

  static constexpr int lanes = 16;
  static constexpr int direct_rows = 4, tile_rows = 4, tile_tokens = 4;
  template <bool Wide>
  static constexpr float offset = 0.0f;

  static __mmask64 load_mask(const uint8_t* p) {
    uint64_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
  }

  template <int W>
  static Codes load(const uint8_t* p) {
    if constexpr (W == 8) {
      return _mm512_loadu_si512(p);
    } else if constexpr (W == 4) {
      const __m512i bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      const __m512i counts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(4), 1);
      return _mm512_and_si512(_mm512_srlv_epi32(bytes, counts), _mm512_set1_epi8(15));
    } else if constexpr (W == 2) {
      const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      const __m512i counts = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
      return _mm512_and_si512(_mm512_srlv_epi32(bytes, counts), _mm512_set1_epi8(3));
    } else {
      return _mm512_maskz_set1_epi8(load_mask(p), 1);
    }
  }

  template <int W>
  static Codes append(Codes codes, const uint8_t* p) {
    if constexpr (W == 1) {
      const __m512i twice = _mm512_add_epi8(codes, codes);
      return _mm512_mask_sub_epi8(twice, load_mask(p), twice, _mm512_set1_epi8(-1));
    } else {
      // Codes of at most 8 - W bits stay in their bytes when wider lanes are shifted.
      return _mm512_or_si512(_mm512_slli_epi32(codes, W), load<W>(p));
    }
  }

  using Table = __m512i;
  static Table load_table(const uint8_t* numbers) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers)));
  }
  static Codes look_up(Codes codes, Table table) { return _mm512_shuffle_epi8(table, codes); }

  static void store(uint8_t* out, Codes codes) { _mm512_storeu_si512(out, codes); }

  using Tokens = __m512i;
  static Tokens load_tokens(const int8_t* p) { return _mm512_loadu_si512(p); }
  static void keep(__m512i& vector) { asm("" : "+v"(vector)); }

  template <bool Wide>
  static Lanes dot(Codes codes, Tokens a) {
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, a));
  }

  static Lanes zero() { return _mm512_setzero_ps(); }
  static Lanes broadcast(float value) { return _mm512_set1_ps(value); }
  static Lanes load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static Lanes load_steps(const uint8_t* group, int) {
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(group)));
    const __m128i steps = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(steps), _mm512_load_ps(kSteps));
  }
  static void store_floats(float* p, Lanes v) { _mm512_storeu_ps(p, v); }
  static Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Lanes v) { return _mm512_reduce_add_ps(v); }
};

}  // namespace

const Kernels kAvx512 = make_kernels<Avx512>("avx512");

}  // namespace dymoe

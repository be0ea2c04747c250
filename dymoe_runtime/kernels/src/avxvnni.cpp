// AVX2 with the 256-bit dot products of AVX-VNNI.
#include "avx2.h"
#include "isa.h"

namespace dymoe {
namespace {

struct AvxVnni : Avx2 {
  template <bool Wide>
  static constexpr float offset = 0.0f;

  /// Sums four products of a byte without a sign and one with it, whatever their size.
  template <bool Wide>
  static Lanes dot(const Codes& codes, const Tokens& a) {
    __m256i sums = _mm256_setzero_si256();
    DYMOE_UNROLL for (int k = 0; k < 4; ++k) sums = _mm256_dpbusd_avx_epi32(sums, codes.part[k], a.part[k]);
    return _mm256_cvtepi32_ps(sums);
  }

  template <bool Wide, int Rows, int Tokens>
  static void dots(const Codes (&codes)[Rows], const Codes (&a)[Tokens], Lanes (&out)[Rows][Tokens]) {
    each_dot<AvxVnni, Wide>(codes, a, out);
  }
};

}  // namespace

const Kernels kAvxVnni = make_kernels<AvxVnni>("avxvnni");

}  // namespace dymoe

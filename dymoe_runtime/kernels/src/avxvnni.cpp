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
    const __m256i low = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes.low, a.low);
    return _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(low, codes.high, a.high));
  }
};

}  // namespace

const Kernels kAvxVnni = make_kernels<AvxVnni>("avxvnni");

}  // namespace dymoe

// CRC-32 with the instructions of some processors.
#include <cstring>

#include "record/checksum_ways.h"
#include "record/polynomial.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace dymoe {
namespace {

#if defined(__x86_64__)

// Folding, from Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel 2009):
// a remainder of 16 bytes or more is multiplied by the power of x that moves it over the bytes that follow, and added
// to them. A few remainders are folded side by side, because a multiplication takes some cycles.

#define DYMOE_FOLDS_16 __attribute__((target("pclmul,sse4.1")))
#define DYMOE_FOLDS_32 __attribute__((target("pclmul,sse4.1,avx2,vpclmulqdq")))
#define DYMOE_FOLDS_64 __attribute__((target("pclmul,sse4.1,avx2,avx512f,vpclmulqdq")))

constexpr int kSideBySide = 4;

/// x^n as a factor: shifted by a bit, because a product of two mirrored polynomials is short by one.
template <int n>
constexpr int64_t kFactor = int64_t(power_of_x(n)) << 1;

/// Returns the factors that move 16 bytes over `nbytes`: of their second and their first half.
template <int nbytes>
DYMOE_FOLDS_16 inline __m128i over() {
  return _mm_set_epi64x(kFactor<8 * nbytes - 32>, kFactor<8 * nbytes + 32>);
}

DYMOE_FOLDS_16 inline __m128i load(const uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

DYMOE_FOLDS_16 inline __m128i fold(__m128i x, __m128i by, __m128i next) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), next);
}

/// Returns the checksum of 16 bytes that continue nothing.
DYMOE_FOLDS_16 inline uint32_t reduce(__m128i x) {
  const __m128i low = _mm_setr_epi32(~0, 0, ~0, 0);
  // The quotient of x^64, and x^32 + the polynomial.
  const __m128i division = _mm_set_epi64x(0x01f7011641, int64_t(kPolynomial) << 1 | 1);
  x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, over<16>(), 0x10));
  x = _mm_xor_si128(_mm_srli_si128(x, 4),
                    _mm_clmulepi64_si128(_mm_and_si128(x, low), _mm_cvtsi64_si128(kFactor<64>), 0x00));
  __m128i y = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(x, low), division, 0x10), low);
  y = _mm_clmulepi64_si128(y, division, 0x00);
  return uint32_t(_mm_extract_epi32(_mm_xor_si128(x, y), 1));
}

DYMOE_FOLDS_16 uint32_t extend_by_16(uint32_t sum, const uint8_t* data, int64_t nbytes) {
  constexpr int kStep = 16 * kSideBySide;
  if (nbytes < kStep) return extend_plainly(sum, data, nbytes);
  __m128i x[kSideBySide];
  for (int i = 0; i < kSideBySide; ++i) x[i] = load(data + 16 * i);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128(int(sum)));
  for (data += kStep, nbytes -= kStep; nbytes >= kStep; data += kStep, nbytes -= kStep)
    for (int i = 0; i < kSideBySide; ++i) x[i] = fold(x[i], over<kStep>(), load(data + 16 * i));
  for (int i = 1; i < kSideBySide; ++i) x[0] = fold(x[0], over<16>(), x[i]);
  for (; nbytes >= 16; data += 16, nbytes -= 16) x[0] = fold(x[0], over<16>(), load(data));
  return extend_plainly(reduce(x[0]), data, nbytes);
}

DYMOE_FOLDS_32 inline __m256i load_32(const uint8_t* data) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
}

DYMOE_FOLDS_32 uint32_t extend_by_32(uint32_t sum, const uint8_t* data, int64_t nbytes) {
  constexpr int kStep = 32 * kSideBySide;
  if (nbytes < 2 * kStep) return extend_by_16(sum, data, nbytes);
  const __m256i by = _mm256_broadcastsi128_si256(over<kStep>());
  __m256i x[kSideBySide];
  for (int i = 0; i < kSideBySide; ++i) x[i] = load_32(data + 32 * i);
  x[0] = _mm256_xor_si256(x[0], _mm256_setr_epi32(int(sum), 0, 0, 0, 0, 0, 0, 0));
  for (data += kStep, nbytes -= kStep; nbytes >= kStep; data += kStep, nbytes -= kStep)
    for (int i = 0; i < kSideBySide; ++i) {
      const __m256i product =
          _mm256_xor_si256(_mm256_clmulepi64_epi128(x[i], by, 0x00), _mm256_clmulepi64_epi128(x[i], by, 0x11));
      x[i] = _mm256_xor_si256(product, load_32(data + 32 * i));
    }
  uint8_t folded[kStep];  // bytes with the same checksum as all so far
  for (int i = 0; i < kSideBySide; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(folded + 32 * i), x[i]);
  return extend_by_16(extend_by_16(0, folded, kStep), data, nbytes);
}

DYMOE_FOLDS_64 uint32_t extend_by_64(uint32_t sum, const uint8_t* data, int64_t nbytes) {
  constexpr int kStep = 64 * kSideBySide;
  if (nbytes < 2 * kStep) return extend_by_16(sum, data, nbytes);
  const __m512i by = _mm512_maskz_broadcast_i32x4(0xffff, over<kStep>());
  __m512i x[kSideBySide];
  for (int i = 0; i < kSideBySide; ++i) x[i] = _mm512_loadu_si512(data + 64 * i);
  x[0] = _mm512_xor_si512(x[0], _mm512_maskz_set1_epi32(1, int(sum)));
  for (data += kStep, nbytes -= kStep; nbytes >= kStep; data += kStep, nbytes -= kStep)
    for (int i = 0; i < kSideBySide; ++i) {
      const __m512i product =
          _mm512_xor_si512(_mm512_clmulepi64_epi128(x[i], by, 0x00), _mm512_clmulepi64_epi128(x[i], by, 0x11));
      x[i] = _mm512_xor_si512(product, _mm512_loadu_si512(data + 64 * i));
    }
  uint8_t folded[kStep];
  for (int i = 0; i < kSideBySide; ++i) _mm512_storeu_si512(folded + 64 * i, x[i]);
  return extend_by_16(extend_by_16(0, folded, kStep), data, nbytes);
}

bool folds_16() { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }

bool folds_32() { return folds_16() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vpclmulqdq"); }

bool folds_64() { return folds_32() && __builtin_cpu_supports("avx512f"); }

#elif defined(__aarch64__) && defined(__linux__)

bool has_instruction() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }

#define DYMOE_CRC __attribute__((target("+crc")))

DYMOE_CRC inline uint32_t extend_by_8(uint32_t sum, const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, 8);
  return __crc32d(sum, word);
}

/// Goes through three thirds side by side, because the instruction takes two or three cycles.
DYMOE_CRC uint32_t extend_by_thirds(uint32_t sum, const uint8_t* data, int64_t nbytes) {
  const int64_t third = nbytes / 24 * 8;
  const uint8_t* const stop = data + nbytes;
  uint32_t second = 0, last = 0;
  for (const uint8_t* end = data + third; data < end; data += 8) {
    sum = extend_by_8(sum, data);
    second = extend_by_8(second, data + third);
    last = extend_by_8(last, data + 2 * third);
  }
  const uint32_t over = power_of_x(8 * third);
  sum = times(over, times(over, sum) ^ second) ^ last;
  data += 2 * third;
  for (; stop - data >= 8; data += 8) sum = extend_by_8(sum, data);
  for (; data < stop; ++data) sum = __crc32b(sum, *data);
  return sum;
}

#endif

}  // namespace

const std::vector<Checksum>& fast_checksums() {
  static const std::vector<Checksum> all = {
#if defined(__x86_64__)
      {"folds of 64 bytes", folds_64, extend_by_64},
      {"folds of 32 bytes", folds_32, extend_by_32},
      {"folds of 16 bytes", folds_16, extend_by_16},
#elif defined(__aarch64__) && defined(__linux__)
      {"instruction", has_instruction, extend_by_thirds},
#endif
  };
  return all;
}

}  // namespace dymoe

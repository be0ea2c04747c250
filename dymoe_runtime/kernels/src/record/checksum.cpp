#include "record/checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace dymoe {
namespace {

constexpr int kSlices = 8;

/// For each byte, its contribution to a checksum that 0 to 7 more bytes follow.
std::array<std::array<uint32_t, 256>, kSlices> make_tables() {
  std::array<std::array<uint32_t, 256>, kSlices> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t sum = byte;
    for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ (sum & 1 ? 0xEDB88320u : 0);
    tables[0][byte] = sum;
  }
  for (int slice = 1; slice < kSlices; ++slice)
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t sum = tables[slice - 1][byte];
      tables[slice][byte] = (sum >> 8) ^ tables[0][sum & 255];
    }
  return tables;
}

/// Continues a checksum whose bits are inverted.
uint32_t plain(uint32_t sum, const uint8_t* data, int64_t nbytes) {
  static const auto tables = make_tables();
  for (; nbytes >= 8; data += 8, nbytes -= 8) {
    for (int i = 0; i < 4; ++i) sum ^= uint32_t(data[i]) << (8 * i);
    sum = tables[7][sum & 255] ^ tables[6][sum >> 8 & 255] ^ tables[5][sum >> 16 & 255] ^ tables[4][sum >> 24] ^
          tables[3][data[4]] ^ tables[2][data[5]] ^ tables[1][data[6]] ^ tables[0][data[7]];
  }
  for (; nbytes > 0; ++data, --nbytes) sum = (sum >> 8) ^ tables[0][(sum ^ *data) & 255];
  return sum;
}

#if defined(__x86_64__)

#define DYMOE_FOLDING __attribute__((target("pclmul,sse4.1")))

DYMOE_FOLDING inline __m128i load(const uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

/// Multiplies both halves of `x` by the powers of the polynomial in `by`, and adds `next`.
DYMOE_FOLDING inline __m128i fold(__m128i x, __m128i by, __m128i next) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), next);
}

/// As `plain`, for at least 64 bytes, a multiple of 16. From Gopal et al., "Fast CRC Computation for Generic
/// Polynomials Using PCLMULQDQ Instruction" (Intel 2009), which has the constants, too.
DYMOE_FOLDING uint32_t folded(uint32_t sum, const uint8_t* data, int64_t nbytes) {
  const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  const __m128i by_4 = _mm_set_epi64x(0, 0x0163cd6124), polynomial = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  const __m128i low = _mm_setr_epi32(~0, 0, ~0, 0);
  __m128i x[4];
  for (int i = 0; i < 4; ++i) x[i] = load(data + 16 * i);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128(int(sum)));
  for (data += 64, nbytes -= 64; nbytes >= 64; data += 64, nbytes -= 64)
    for (int i = 0; i < 4; ++i) x[i] = fold(x[i], by_64, load(data + 16 * i));
  __m128i y = x[0];
  for (int i = 1; i < 4; ++i) y = fold(y, by_16, x[i]);
  for (; nbytes >= 16; data += 16, nbytes -= 16) y = fold(y, by_16, load(data));
  y = _mm_xor_si128(_mm_srli_si128(y, 8), _mm_clmulepi64_si128(y, by_16, 0x10));
  y = _mm_xor_si128(_mm_srli_si128(y, 4), _mm_clmulepi64_si128(_mm_and_si128(y, low), by_4, 0x00));
  __m128i z = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(y, low), polynomial, 0x10), low);
  z = _mm_clmulepi64_si128(z, polynomial, 0x00);
  return uint32_t(_mm_extract_epi32(_mm_xor_si128(y, z), 1));
}

bool has_fast() { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }

uint32_t fast(uint32_t sum, const uint8_t* data, int64_t nbytes) {
  const int64_t whole = nbytes >= 64 ? nbytes / 16 * 16 : 0;
  if (whole) sum = folded(sum, data, whole);
  return plain(sum, data + whole, nbytes - whole);
}

#elif defined(__aarch64__) && defined(__linux__)

bool has_fast() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }

__attribute__((target("+crc"))) uint32_t fast(uint32_t sum, const uint8_t* data, int64_t nbytes) {
  for (; nbytes >= 8; data += 8, nbytes -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    sum = __crc32d(sum, word);
  }
  for (; nbytes > 0; ++data, --nbytes) sum = __crc32b(sum, *data);
  return sum;
}

#else

bool has_fast() { return false; }

uint32_t fast(uint32_t sum, const uint8_t* data, int64_t nbytes) { return plain(sum, data, nbytes); }

#endif

}  // namespace

uint32_t crc32_of(const uint8_t* data, int64_t nbytes) {
  static const bool is_fast = has_fast();
  return ~(is_fast ? fast(~0u, data, nbytes) : plain(~0u, data, nbytes));
}

uint32_t plain_crc32_of(const uint8_t* data, int64_t nbytes) { return ~plain(~0u, data, nbytes); }

}  // namespace dymoe

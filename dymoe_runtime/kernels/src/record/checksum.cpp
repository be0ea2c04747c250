#include "record/checksum.h"

#include <array>

#include "record/checksum_ways.h"
#include "record/polynomial.h"

namespace dymoe {
namespace {

constexpr int kSlices = 8;

/// For each byte, its contribution to a checksum that 0 to 7 more bytes follow.
std::array<std::array<uint32_t, 256>, kSlices> make_tables() {
  std::array<std::array<uint32_t, 256>, kSlices> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t sum = byte;
    for (int bit = 0; bit < 8; ++bit) sum = times_x(sum);
    tables[0][byte] = sum;
  }
  for (int slice = 1; slice < kSlices; ++slice)
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t sum = tables[slice - 1][byte];
      tables[slice][byte] = (sum >> 8) ^ tables[0][sum & 255];
    }
  return tables;
}

bool runs_everywhere() { return true; }

const Checksum kPlain = {"plain", runs_everywhere, extend_plainly};

std::vector<const Checksum*> detect() {
  std::vector<const Checksum*> found;
  for (const Checksum& way : fast_checksums())
    if (way.runs_here()) found.push_back(&way);
  found.push_back(&kPlain);
  return found;
}

}  // namespace

uint32_t extend_plainly(uint32_t sum, const uint8_t* data, int64_t nbytes) {
  static const auto tables = make_tables();
  for (; nbytes >= 8; data += 8, nbytes -= 8) {
    for (int i = 0; i < 4; ++i) sum ^= uint32_t(data[i]) << (8 * i);
    sum = tables[7][sum & 255] ^ tables[6][sum >> 8 & 255] ^ tables[5][sum >> 16 & 255] ^ tables[4][sum >> 24] ^
          tables[3][data[4]] ^ tables[2][data[5]] ^ tables[1][data[6]] ^ tables[0][data[7]];
  }
  for (; nbytes > 0; ++data, --nbytes) sum = (sum >> 8) ^ tables[0][(sum ^ *data) & 255];
  return sum;
}

const std::vector<const Checksum*>& available_checksums() {
  static const std::vector<const Checksum*> found = detect();
  return found;
}

uint32_t crc32_of(const Checksum& way, const uint8_t* data, int64_t nbytes) { return ~way.extend(~0u, data, nbytes); }

uint32_t crc32_of(const uint8_t* data, int64_t nbytes) {
  static const Checksum& fastest = *available_checksums().front();
  return crc32_of(fastest, data, nbytes);
}

uint32_t crc32_after(uint32_t before, uint32_t next, int64_t nbytes) {
  return times(power_of_x(8 * nbytes), before) ^ next;
}

}  // namespace dymoe

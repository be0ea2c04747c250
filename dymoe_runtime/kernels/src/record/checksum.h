// The checksum of segments: the CRC-32 of zlib.
#pragma once

#include <cstdint>

namespace dymoe {

/// Returns the CRC-32 of some bytes, as zlib computes it.
uint32_t crc32_of(const uint8_t* data, int64_t nbytes);

/// As `crc32_of`, without the instructions that some processors have for it: the reference.
uint32_t plain_crc32_of(const uint8_t* data, int64_t nbytes);

}  // namespace dymoe

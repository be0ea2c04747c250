// The checksum of segments: the CRC-32 of zlib.
#pragma once

#include <cstdint>
#include <vector>

namespace dymoe {

/// A way to compute CRC-32.
struct Checksum {
  const char* name;
  bool (*runs_here)();
  /// Continues a checksum whose bits are inverted.
  uint32_t (*extend)(uint32_t sum, const uint8_t* data, int64_t nbytes);
};

/// Returns the CRC-32 of some bytes, as zlib computes it.
uint32_t crc32_of(const uint8_t* data, int64_t nbytes);

/// Returns the same, computed in a certain way.
uint32_t crc32_of(const Checksum& way, const uint8_t* data, int64_t nbytes);

/// Returns the CRC-32 of some bytes and the `nbytes` that follow them, from the CRC-32 of each.
uint32_t crc32_after(uint32_t before, uint32_t next, int64_t nbytes);

/// Returns the ways that this processor can go, fastest first; the last is the reference.
const std::vector<const Checksum*>& available_checksums();

}  // namespace dymoe

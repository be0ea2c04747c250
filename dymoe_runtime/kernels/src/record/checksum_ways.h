// The ways to compute CRC-32 that only some processors can go.
#pragma once

#include <cstdint>
#include <vector>

#include "record/checksum.h"

namespace dymoe {

/// Returns the ways that this build knows beside the reference, fastest first.
const std::vector<Checksum>& fast_checksums();

/// Continues a checksum whose bits are inverted, on every processor.
uint32_t extend_plainly(uint32_t sum, const uint8_t* data, int64_t nbytes);

}  // namespace dymoe

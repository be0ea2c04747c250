// The instruction sets that this build has, and which of them this processor runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dymoe {

extern const Kernels kScalar, kAvx2, kAvxVnni, kAvx512, kNeon, kI8mm;

/// Kernels that run here, best first; the last is the scalar one.
const std::vector<const Kernels*>& available_isas();

/// The kernels called `name`; std::invalid_argument if they do not run here.
const Kernels& find_isa(const std::string& name);

}  // namespace dymoe

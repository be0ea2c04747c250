// The instruction sets of this build, and the choice of those that this processor runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dymoe {

/// The kernels of each instruction set; a build defines those that its compiler knows.
extern const Kernels kScalar, kAvx2, kAvxVnni, kAvx512, kAvx512Vbmi, kAmx, kNeon, kI8mm;

/// Returns the kernels that run on this processor, best first; the last are the scalar ones.
const std::vector<const Kernels*>& available_isas();

/// Returns the kernels called `name`. Throws std::invalid_argument if they do not run on this processor.
const Kernels& find_isa(const std::string& name);

}  // namespace dymoe

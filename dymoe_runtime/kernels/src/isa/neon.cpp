// The kernels for NEON with dot products (ARMv8.2).
#include "isa/neon.h"

#include "isa/isa.h"

namespace dymoe {

const Kernels kNeon = make_kernels<Neon, Halved<Neon>>("neon");

}  // namespace dymoe

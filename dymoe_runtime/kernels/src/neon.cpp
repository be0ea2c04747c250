// NEON with dot products (ARMv8.2).
#include "neon.h"

#include "isa.h"

namespace dymoe {

const Kernels kNeon = make_kernels<Neon>("neon");

}  // namespace dymoe

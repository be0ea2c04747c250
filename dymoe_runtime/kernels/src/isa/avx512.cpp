// The kernels for AVX-512 F, BW, DQ, VL and VNNI.
#include "isa/avx512.h"

#include "isa/isa.h"

namespace dymoe {

const Kernels kAvx512 = make_kernels<Avx512, HalvedAvx512>("avx512");

}  // namespace dymoe

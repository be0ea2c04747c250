// The kernels for AVX-512 with VBMI.
#include "isa/avx512vbmi.h"

#include "isa/isa.h"

namespace dymoe {

const Kernels kAvx512Vbmi = make_kernels<Avx512Vbmi, HalvedAvx512>("avx512vbmi");

}  // namespace dymoe

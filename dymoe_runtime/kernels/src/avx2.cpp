// AVX2 and FMA.
#include "avx2.h"

#include "isa.h"

namespace dymoe {

const Kernels kAvx2 = make_kernels<Avx2>("avx2");

}  // namespace dymoe

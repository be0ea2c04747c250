// The kernels for AVX2 and FMA.
#include "isa/avx2.h"

#include "isa/isa.h"

namespace dymoe {

const Kernels kAvx2 = make_kernels<Avx2, Halved<Avx2>>("avx2");

}  // namespace dymoe

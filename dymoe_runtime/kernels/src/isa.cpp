#include "isa.h"

#include <stdexcept>

namespace dymoe {
namespace {

struct Row {
  const Kernels* kernels;
  bool (*runs_here)();
};

const Row kRows[] = {
#ifdef DYMOE_AVX512
    {&kAvx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512vnni");
     }},
#endif
#ifdef DYMOE_AVX2
    {&kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&kScalar, [] { return true; }},
};

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found;
  for (const Row& row : kRows)
    if (row.runs_here()) found.push_back(row.kernels);
  return found;
}

}  // namespace

const std::vector<const Kernels*>& available_isas() {
  static const std::vector<const Kernels*> found = detect();
  return found;
}

const Kernels& find_isa(const std::string& name) {
  for (const Kernels* kernels : available_isas())
    if (name == kernels->name) return *kernels;
  throw std::invalid_argument("instruction set '" + name + "' is not available");
}

}  // namespace dymoe

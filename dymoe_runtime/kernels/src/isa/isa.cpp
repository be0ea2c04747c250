#include "isa/isa.h"

#include <stdexcept>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace dymoe {
namespace {

/// The kernels of an instruction set, and the test for a processor that runs them.
struct Row {
  const Kernels* kernels;
  bool (*runs_here)();
};

#if defined(DYMOE_NEON) || defined(DYMOE_I8MM)
bool has_dot_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every 64-bit processor of a Mac
#endif
}
#endif

#ifdef DYMOE_AVX2
/// Whether the processor converts half precision (F16C). Older compilers' __builtin_cpu_supports does not know.
bool has_halves() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#ifdef DYMOE_AVXVNNI
/// Whether the processor has AVX-VNNI, which __builtin_cpu_supports of Clang 14 does not know.
bool has_short_dot_products() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#ifdef DYMOE_I8MM
bool has_matrix_products() {
#if defined(__linux__)
  constexpr unsigned long kMatrixProducts = 1 << 13;  // HWCAP2_I8MM, which headers before Linux 5.10 lack
  return getauxval(AT_HWCAP2) & kMatrixProducts;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

#ifdef DYMOE_AMX
/// Whether the processor has matrix tiles of int8, and the system lets this process use them. From then on the system
/// refuses stacks for signals that could not hold the tiles; it refuses the tiles if a thread has such a stack already.
bool has_tiles() {
  constexpr unsigned kTilesAndProducts = 3u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTilesAndProducts) != kTilesAndProducts) return false;
#if defined(__linux__)
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux 5.16, and what it is asked for
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#ifdef DYMOE_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

const Row kRows[] = {
#ifdef DYMOE_AMX
    {&kAmx, [] { return has_avx512() && __builtin_cpu_supports("avx512vbmi") && has_tiles(); }},
#endif
#ifdef DYMOE_AVX512VBMI
    {&kAvx512Vbmi, [] { return has_avx512() && __builtin_cpu_supports("avx512vbmi"); }},
#endif
#ifdef DYMOE_AVX512
    {&kAvx512, has_avx512},
#endif
#ifdef DYMOE_AVXVNNI
    {&kAvxVnni,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_halves() &&
              has_short_dot_products() && __builtin_cpu_supports("gfni");
     }},
#endif
#ifdef DYMOE_AVX2
    {&kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_halves(); }},
#endif
#ifdef DYMOE_I8MM
    {&kI8mm, [] { return has_dot_products() && has_matrix_products(); }},
#endif
#ifdef DYMOE_NEON
    {&kNeon, has_dot_products},
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

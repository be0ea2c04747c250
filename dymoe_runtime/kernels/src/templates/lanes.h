// Vectors of floats and ints as wide as those of the processor that a source file is compiled for.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cstdint>

namespace dymoe {
namespace {

// GCC moves vectors wider than the processor's through memory: eight times slower, measured on AVX2.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

}  // namespace
}  // namespace dymoe

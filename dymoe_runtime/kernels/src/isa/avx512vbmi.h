// The policy of AVX-512 with VBMI, which shuffles bytes by six bits of an index and takes no heed of the other two.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include "isa/avx512.h"

namespace dymoe {
namespace {

struct Avx512Vbmi : Avx512 {
  // A table of 16 bytes stands four times in 64, so that only the lower four bits of an index count.
  static Bytes low_nibbles(Bytes v) { return v; }
  static Bytes high_nibbles(Bytes v) { return _mm512_srli_epi32(v, 4); }
  static Bytes shuffle(Bytes table, Bytes indices) { return _mm512_permutexvar_epi8(indices, table); }
};

}  // namespace
}  // namespace dymoe

// The kernels for NEON with dot products and int8 matrix products (ARMv8.6).
#include "isa/isa.h"
#include "isa/neon.h"

namespace dymoe {
namespace {

// One instruction multiplies two rows by two tokens, eight columns of each. Sums of a block are whole numbers, which
// are scaled and added up as in the NEON kernels. So floats are rounded as there, and an element has the same bits
// whether its token comes alone, through dot products, or with others.
struct I8mm : Neon {
  static constexpr bool pairs = true;
  // The sums of eight rows take half of the registers, and tokens are paired only once for all eight.
  static constexpr int tile_rows = 8, tile_tokens = 2;
  static constexpr int64_t folded_from = INT64_MAX;

  /// Eight columns each of a block of two rows, or of two tokens.
  struct Pair {
    int8x16_t columns[8];
  };
  template <class T>
  static Pair pair_of(const T* a, const T* b) {
    Pair pair;
    DYMOE_UNROLL for (int k = 0; k < 4; ++k) {
      const uint64x2_t x = vld1q_u64(reinterpret_cast<const uint64_t*>(a + 16 * k));
      const uint64x2_t y = vld1q_u64(reinterpret_cast<const uint64_t*>(b + 16 * k));
      pair.columns[2 * k] = vreinterpretq_s8_u64(vzip1q_u64(x, y));
      pair.columns[2 * k + 1] = vreinterpretq_s8_u64(vzip2q_u64(x, y));
    }
    return pair;
  }

  template <bool Wide>
  static void pair_rows(const uint8_t* a, const uint8_t* b, uint8_t* out) {
    const Pair pair = pair_of(a, b);
    DYMOE_UNROLL for (int k = 0; k < 8; ++k)
        vst1q_u8(out + 16 * k, vreinterpretq_u8_s8(make_signed<Wide>(vreinterpretq_u8_s8(pair.columns[k]))));
  }

  using TokenPair = Pair;
  static TokenPair load_token_pair(const int8_t* a, const int8_t* b) { return pair_of(a, b); }

  static Lanes pair_scales(const float* rows, int64_t row_pitch, const float* tokens, int64_t pitch) {
    const float32x4_t of_rows = vcombine_f32(vld1_dup_f32(rows), vld1_dup_f32(rows + row_pitch));
    const float32x2_t both = vld1_lane_f32(tokens + pitch, vld1_dup_f32(tokens), 1);
    return vmulq_f32(of_rows, vcombine_f32(both, both));
  }

  /// Lets GCC use codes as they are loaded; else it loads those of all pairs first and leaves no registers for the
  /// sums.
  DYMOE_INLINE static void keep_order() {
#if !defined(__clang__)
    asm volatile("");
#endif
  }

  DYMOE_INLINE static Lanes pair_dot(const uint8_t* rows, const TokenPair& tokens) {
    keep_order();
    int32x4_t sums = vdupq_n_s32(0);
    DYMOE_UNROLL for (int k = 0; k < 8; ++k) sums =
        vmmlaq_s32(sums, vreinterpretq_s8_u8(vld1q_u8(rows + 16 * k)), tokens.columns[k]);
    return vcvtq_f32_s32(sums);
  }

  static void part_pair(Lanes (&first)[2], Lanes (&second)[2]) {
    const float32x4_t rows[4] = {vzip1q_f32(first[0], second[0]), vzip2q_f32(first[0], second[0]),
                                 vzip1q_f32(first[1], second[1]), vzip2q_f32(first[1], second[1])};
    first[0] = vzip1q_f32(rows[0], rows[2]), first[1] = vzip2q_f32(rows[0], rows[2]);
    second[0] = vzip1q_f32(rows[1], rows[3]), second[1] = vzip2q_f32(rows[1], rows[3]);
  }
};

/// The first two lanes of a dot product are those of the first half of a block. So a product of pairs sums the eight
/// columns that one lane sums in two pieces.
struct HalvedI8mm : Halved<I8mm> {
  static constexpr int tile_rows = 8;

  /// A block of two rows or two tokens, by lanes of four columns. low[j] holds lane j of pieces 0 and 1 of the first,
  /// then of the second; high[j] holds lane j of pieces 2 and 3.
  struct Pair {
    uint8x16_t low[4], high[4];
  };

  static Pair pair_of(const void* a, const void* b) {
    const uint32x4x4_t first = vld4q_u32(static_cast<const uint32_t*>(a));
    const uint32x4x4_t second = vld4q_u32(static_cast<const uint32_t*>(b));
    Pair pair;
    DYMOE_UNROLL for (int j = 0; j < 4; ++j) {
      const uint64x2_t x = vreinterpretq_u64_u32(first.val[j]), y = vreinterpretq_u64_u32(second.val[j]);
      pair.low[j] = vreinterpretq_u8_u64(vzip1q_u64(x, y));
      pair.high[j] = vreinterpretq_u8_u64(vzip2q_u64(x, y));
    }
    return pair;
  }

  template <bool>
  static void pair_rows(const uint8_t* a, const uint8_t* b, uint8_t* out) {
    const Pair pair = pair_of(a, b);
    DYMOE_UNROLL for (int j = 0; j < 4; ++j) {
      vst1q_u8(out + 16 * j, pair.low[j]);
      vst1q_u8(out + kBlock + 16 * j, pair.high[j]);
    }
  }

  using TokenPair = Pair;
  static TokenPair load_token_pair(const int8_t* a, const int8_t* b) { return pair_of(a, b); }

  /// Returns the sums of the products of four lanes.
  static Lanes multiply_lanes(uint8x16_t a, uint8x16_t of_a, uint8x16_t b, uint8x16_t of_b) {
    const int32x4_t sums = vmmlaq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(a), vreinterpretq_s8_u8(of_a));
    return vcvtq_f32_s32(vmmlaq_s32(sums, vreinterpretq_s8_u8(b), vreinterpretq_s8_u8(of_b)));
  }

  DYMOE_INLINE static void pair_dots(const Codes& low, const Codes& high, const TokenPair& tokens, Lanes (&out)[4]) {
    keep_order();
    DYMOE_UNROLL for (int j = 0; j < 4; j += 2) {
      out[j / 2] = multiply_lanes(low.part[j], tokens.low[j], low.part[j + 1], tokens.low[j + 1]);
      out[2 + j / 2] = multiply_lanes(high.part[j], tokens.high[j], high.part[j + 1], tokens.high[j + 1]);
    }
  }
};

}  // namespace

const Kernels kI8mm = make_kernels<I8mm, HalvedI8mm>("i8mm");

}  // namespace dymoe

// The policy of NEON with dot products; product.h says what a policy has.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <arm_neon.h>

#include "templates/fold.h"
#include "templates/product.h"

namespace dymoe {
namespace {

struct Neon {
  struct Codes {
    uint8x16_t part[4];  // 16 columns each
  };
  using Lanes = float32x4_t;

  static constexpr int64_t at_once = 1, scales = 1;
  static constexpr int lanes = 4;
  static constexpr int direct_rows = 4, direct_step = 4, tile_rows = 4, tile_tokens = 4;
  static constexpr int direct_tokens = 1;
  template <bool Wide>
  static constexpr int direct_most = 1;
  static constexpr bool pairs = false, folds = true, transposes = false;
  static constexpr int folded_together = 2;
  static constexpr int64_t folded_from = 4, unfolded_tokens = 2;
  static constexpr int64_t unpacked_rows = 8;
  template <int... Widths>
  static constexpr bool merges = false;
  template <bool Wide>
  static constexpr float offset = Wide ? 128.0f : 0.0f;

  /// Returns -1 in those of 16 columns whose bit is set in the two bytes at p, and 0 in the others.
  static uint8x16_t spread_bits(const uint8_t* p) {
    constexpr uint8_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    return vtstq_u8(vcombine_u8(vdup_n_u8(p[0]), vdup_n_u8(p[1])), vld1q_u8(kBits));
  }

  template <int W>
  static Codes load(const uint8_t* p, int64_t = 1) {
    Codes codes;
    if constexpr (W == 8) {
      for (int i = 0; i < 4; ++i) codes.part[i] = vld1q_u8(p + 16 * i);
    } else if constexpr (W == 4) {
      for (int i = 0; i < 2; ++i) {
        const uint8x16_t bytes = vld1q_u8(p + 16 * i);
        codes.part[i] = vandq_u8(bytes, vdupq_n_u8(15));
        codes.part[i + 2] = vshrq_n_u8(bytes, 4);
      }
    } else if constexpr (W == 2) {
      const uint8x16_t bytes = vld1q_u8(p), mask = vdupq_n_u8(3);
      codes.part[0] = vandq_u8(bytes, mask);
      codes.part[1] = vandq_u8(vshrq_n_u8(bytes, 2), mask);
      codes.part[2] = vandq_u8(vshrq_n_u8(bytes, 4), mask);
      codes.part[3] = vshrq_n_u8(bytes, 6);
    } else {
      for (int i = 0; i < 4; ++i) codes.part[i] = vandq_u8(spread_bits(p + 2 * i), vdupq_n_u8(1));
    }
    return codes;
  }

  template <int W>
  static Codes append(Codes codes, const uint8_t* p, int64_t) {
    if constexpr (W == 1) {
      for (int i = 0; i < 4; ++i)
        codes.part[i] = vsubq_u8(vaddq_u8(codes.part[i], codes.part[i]), spread_bits(p + 2 * i));
    } else {
      const Codes bits = load<W>(p);
      for (int i = 0; i < 4; ++i) codes.part[i] = vorrq_u8(vshlq_n_u8(codes.part[i], W & 7), bits.part[i]);
    }
    return codes;
  }

  using Table = uint8x16_t;
  static Table load_table(const uint8_t* numbers) { return vld1q_u8(numbers); }
  static Codes look_up(Codes codes, Table table) {
    for (uint8x16_t& part : codes.part) part = vqtbl1q_u8(table, part);
    return codes;
  }

  using Bytes = uint8x16_t;
  static Bytes load_bytes(const uint8_t* p, int64_t) { return vld1q_u8(p); }
  static Bytes load_table16(const uint8_t* p) { return vld1q_u8(p); }
  static Bytes exclusive_or(Bytes a, Bytes b) { return veorq_u8(a, b); }
  template <int Mask>
  static Bytes choose_bits(Bytes a, Bytes b) {
    return vbslq_u8(vdupq_n_u8(Mask), a, b);
  }
  static Bytes low_nibbles(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
  static Bytes high_nibbles(Bytes v) { return vshrq_n_u8(v, 4); }
  static Bytes shuffle(Bytes table, Bytes indices) { return vqtbl1q_u8(table, indices); }
  static Bytes add_bytes(Bytes a, Bytes b) { return vaddq_u8(a, b); }
  static Bytes& part(Codes& codes, int k) { return codes.part[k]; }
  static Bytes load_register(const uint8_t* p) { return vld1q_u8(p); }
  static void store_register(uint8_t* p, Bytes v) { vst1q_u8(p, v); }
  template <int Bits, bool High>
  static Bytes unpack(Bytes a, Bytes b) {
    if constexpr (Bits == 32) {
      const uint32x4_t x = vreinterpretq_u32_u8(a), y = vreinterpretq_u32_u8(b);
      return vreinterpretq_u8_u32(High ? vzip2q_u32(x, y) : vzip1q_u32(x, y));
    } else {
      const uint64x2_t x = vreinterpretq_u64_u8(a), y = vreinterpretq_u64_u8(b);
      return vreinterpretq_u8_u64(High ? vzip2q_u64(x, y) : vzip1q_u64(x, y));
    }
  }

  static void store(uint8_t* out, const Codes& codes) {
    for (int i = 0; i < 4; ++i) vst1q_u8(out + 16 * i, codes.part[i]);
  }

  static Codes load_stored(const uint8_t* p) { return load<8>(p); }

  struct Tokens {
    int8x16_t part[4];
  };
  static Tokens load_tokens(const int8_t* p) {
    return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}};
  }

  /// Four sums of a block.
  using Sums = int32x4_t;
  static Sums no_sums() { return vdupq_n_s32(0); }
  static Sums add_adjacent(Sums a, Sums b) { return vpaddq_s32(a, b); }
  static Lanes to_lanes(Sums sums) { return vcvtq_f32_s32(sums); }
  template <bool Wide>
  static int8x16_t make_signed(uint8x16_t codes) {
    return vreinterpretq_s8_u8(Wide ? veorq_u8(codes, vdupq_n_u8(128)) : codes);
  }
  template <bool Wide>
  static Sums sum_products(const Codes& codes, const Tokens& a) {
    Sums sums = no_sums();
    for (int i = 0; i < 4; ++i) sums = vdotq_s32(sums, make_signed<Wide>(codes.part[i]), a.part[i]);
    return sums;
  }
  static Sums fold_rest(Sums sums, int64_t count, int64_t before) { return fold_few<Neon>(sums, count, before); }
  static void fold_row(const uint8_t* from, int64_t blocks, uint8_t* to) { fold_pieces<Neon>(from, blocks, to); }

  template <bool>
  static constexpr int64_t folded_step = 32;
  struct Folds {
    int8x16_t part[2];
  };
  template <bool Wide>
  static Folds load_folded_row(const uint8_t* p) {
    return {{make_signed<Wide>(vld1q_u8(p)), make_signed<Wide>(vld1q_u8(p + 16))}};
  }
  template <bool>
  static Folds load_folded_token(const int8_t* p) {
    return {{vld1q_s8(p), vld1q_s8(p + 16)}};
  }
  template <bool>
  static Sums add_products(const Folds& row, const Folds& token, Sums sums) {
    return vdotq_s32(vdotq_s32(sums, row.part[0], token.part[0]), row.part[1], token.part[1]);
  }
  template <int Rows, int Tokens>
  static void hold(Sums (&)[Rows][Tokens]) {}

  static Lanes zero() { return vdupq_n_f32(0.0f); }
  static Lanes broadcast(float value) { return vdupq_n_f32(value); }
  static Lanes load_floats(const float* p) { return vld1q_f32(p); }
  static Lanes load_scale_sizes(const float* sizes, uint64_t word) {
    constexpr int32_t kShifts[4] = {0, -4, -8, -12};
    const uint32x4_t shifted = vshlq_u32(vdupq_n_u32(uint32_t(word)), vld1q_s32(kShifts));
    // Each index becomes those of the four bytes of its float.
    const uint32x4_t indices = vandq_u32(shifted, vdupq_n_u32(15));
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), indices, 0x04040404);
    const uint8_t* table = reinterpret_cast<const uint8_t*>(sizes);
    const uint8x16x4_t all = {{vld1q_u8(table), vld1q_u8(table + 16), vld1q_u8(table + 32), vld1q_u8(table + 48)}};
    return vreinterpretq_f32_u8(vqtbl4q_u8(all, vreinterpretq_u8_u32(bytes)));
  }
  static Lanes load_folded_sizes(const float* sizes, uint64_t word) { return load_scale_sizes(sizes, word); }
  static void store_floats(float* p, Lanes v) { vst1q_f32(p, v); }
  static Lanes multiply(Lanes a, Lanes b) { return vmulq_f32(a, b); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return vfmaq_f32(c, a, b); }
  template <int Rows>
  static void sum(const Lanes (&v)[Rows], float (&out)[Rows]) {
    for (int r = 0; r < Rows; ++r) out[r] = vaddvq_f32(v[r]);
  }
};

/// The first two lanes of a dot product are those of the first half of the block.
template <class Base>
struct Halved : Base {
  using typename Base::Codes, typename Base::Lanes, typename Base::Tokens;

  static constexpr int64_t scales = 2;
  static constexpr int tile_rows = 2, tile_tokens = 2;
  static constexpr bool folds = false;

  template <bool Wide>
  static Lanes dot(const Codes& codes, const Tokens& a) {
    int32x4_t sums[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    for (int i = 0; i < 4; ++i) sums[i / 2] = vdotq_s32(sums[i / 2], vreinterpretq_s8_u8(codes.part[i]), a.part[i]);
    return vcvtq_f32_s32(vpaddq_s32(sums[0], sums[1]));
  }

  template <bool Wide, int Rows, int Count>
  static void dots(const Codes (&codes)[Rows], const Tokens (&a)[Count], Lanes (&out)[Rows][Count]) {
    each_dot<Halved, Wide>(codes, a, out);
  }

  static Lanes load_half_scales(const float* p) {
    const float32x2_t both = vld1_f32(p);
    return vcombine_f32(vdup_lane_f32(both, 0), vdup_lane_f32(both, 1));
  }
};

}  // namespace
}  // namespace dymoe

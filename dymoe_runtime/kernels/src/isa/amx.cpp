// The kernels for AMX: those of AVX-512 with VBMI, but many tokens are multiplied in matrix tiles of int8.
//
// A tile product multiplies a block of 16 rows by the same block of 16 tokens, in whole numbers. The results are scaled
// and added up in the order of folded products, so an element has the same bits as if its token came alone.
#include "isa/avx512vbmi.h"
#include "isa/isa.h"

namespace dymoe {
namespace {

struct Amx : Avx512Vbmi {
  static constexpr bool transposes = true;
  // Rows are never folded: tokens would have to be quantized in a third order. Tiles pay off from 8 tokens on.
  static constexpr int64_t folded_from = INT64_MAX, transposed_from = 8;

  static void multiply_transposed(const MatrixView& m, const Activations& a, int64_t row, int64_t count,
                                  const float* sizes, float* y, int64_t stride, uint8_t* codes);
};

constexpr int64_t kTile = 16;   // rows and tokens of a tile product
constexpr int64_t kAtOnce = 4;  // most blocks of a lane that are multiplied before they are scaled
constexpr int64_t kPairs = Amx::lanes / 2;

/// The rows of unpacked codes and the tokens of tile products. `codes` [kTile, codes_pitch] has its blocks one after
/// the other, `sizes` [kTile, a.pitch] is in the order of folded lanes, and the tokens are those from `token` on.
struct TileRows {
  const uint8_t* codes;
  const float* sizes;
  const Activations& a;
  int64_t token;
  __m512 off_centre;

  const int8_t* tokens(int64_t block) const {
    return a.transposed_codes + block * kBlock * a.transposed_pitch + 4 * token;
  }
};

/// A step of a product: lanes `pair` and `pair + kPairs`, which are added to each other, and of each at most kAtOnce
/// blocks from number `first` of the lane on.
struct TileStep {
  int64_t pair, first;
};

/// The products of a step, [lane, number of the block, row, token].
struct alignas(64) Products {
  int32_t of[2][kAtOnce][kTile][kTile];
};

/// The unfinished sums of [row], each a vector of tokens. tree[l] has sums of 2^l pairs of lanes that wait for those of
/// as many others; its last level is the result.
struct Unfinished {
  __m512 sums[2][kTile], corrections[2][kTile];  // [lane, row], of lanes with more than kAtOnce blocks
  __m512 tree[4][kTile];
};
static_assert(kPairs == 8, "a tree of three levels and its result");

int64_t first_block(int64_t lane) { return folded_block<Amx>(lane); }

/// Returns the number of blocks of a lane.
int64_t blocks_of_lane(int64_t blocks, int64_t lane) {
  return (blocks - first_block(lane) + Amx::lanes - 1) / Amx::lanes;
}

/// Transposes 128-bit lanes: lane j of v[i] becomes lane i of v[j].
void transpose_lanes(__m512i (&v)[4]) {
  const __m512i low_ab = _mm512_shuffle_i32x4(v[0], v[1], 0x44), high_ab = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
  const __m512i low_cd = _mm512_shuffle_i32x4(v[2], v[3], 0x44), high_cd = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(low_ab, low_cd, 0x88), v[1] = _mm512_shuffle_i32x4(low_ab, low_cd, 0xdd);
  v[2] = _mm512_shuffle_i32x4(high_ab, high_cd, 0x88), v[3] = _mm512_shuffle_i32x4(high_ab, high_cd, 0xdd);
}

/// Puts the blocks of stored codes one after the other; `nbytes` is a multiple of four blocks.
void part_blocks(int64_t nbytes, uint8_t* codes) {
  for (uint8_t *at = codes, *end = codes + nbytes; at < end; at += 4 * kBlock) {
    __m512i pieces[4];
    DYMOE_UNROLL for (int k = 0; k < 4; ++k) pieces[k] = _mm512_loadu_si512(at + 64 * k);
    transpose_lanes(pieces);
    DYMOE_UNROLL for (int k = 0; k < 4; ++k) _mm512_storeu_si512(at + 64 * k, pieces[k]);
  }
}

// Instructions name tiles by constants, so this is a macro: a product in tile C of rows in tile A and tokens in tile B.
#define DYMOE_MULTIPLY_TILE(C, A, B, rows, block, out)                         \
  do {                                                                         \
    _tile_loadd(A, rows.codes + (block) * kBlock, codes_pitch(rows.a.blocks)); \
    _tile_loadd(B, rows.tokens(block), 4 * rows.a.transposed_pitch);           \
    _tile_zero(C);                                                             \
    _tile_dpbusd(C, A, B);                                                     \
    _tile_stored(C, out, kTile * sizeof(int32_t));                             \
  } while (0)

/// Multiplies the blocks of a lane from number `first` on, at most kAtOnce.
void multiply_lane(const TileRows& rows, int64_t lane, int64_t first, int32_t (&out)[kAtOnce][kTile][kTile]) {
  const int64_t count = blocks_of_lane(rows.a.blocks, lane) - first, block = first_block(lane) + first * Amx::lanes;
  if (count > 0) DYMOE_MULTIPLY_TILE(0, 4, 5, rows, block, out[0]);
  if (count > 1) DYMOE_MULTIPLY_TILE(1, 6, 7, rows, block + Amx::lanes, out[1]);
  if (count > 2) DYMOE_MULTIPLY_TILE(2, 4, 5, rows, block + 2 * Amx::lanes, out[2]);
  if (count > 3) DYMOE_MULTIPLY_TILE(3, 6, 7, rows, block + 3 * Amx::lanes, out[3]);
}

#undef DYMOE_MULTIPLY_TILE

/// Multiplies the blocks of a step.
void multiply_step(const TileRows& rows, TileStep step, Products& products) {
  multiply_lane(rows, step.pair, step.first, products.of[0]);
  multiply_lane(rows, step.pair + kPairs, step.first, products.of[1]);
}

/// The blocks of a lane in a step: `count` of them. The pointers are to the first of them and of kTile tokens.
struct LaneBlocks {
  const int32_t (*products)[kTile][kTile];
  const float *sizes, *scales, *sums;
  int64_t count;

  LaneBlocks(const TileRows& rows, int64_t lane, int64_t first, const int32_t (*products)[kTile][kTile])
      : products(products), sizes(rows.sizes + first * Amx::lanes + lane) {
    count = smaller(blocks_of_lane(rows.a.blocks, lane) - first, kAtOnce);
    const int64_t block = count > 0 ? first_block(lane) + first * Amx::lanes : 0;
    const int64_t at = block * rows.a.transposed_pitch + rows.token;
    scales = rows.a.transposed_scales + at, sums = rows.a.transposed_sums + at;
  }
};

/// Scales the products of a step and adds them to the sums.
void add_step(const TileRows& rows, TileStep step, const Products& products, Unfinished& sums) {
  constexpr int kRows = 8;  // whose scales of tokens are read once
  const int64_t pitch = rows.a.pitch, next = Amx::lanes * rows.a.transposed_pitch;
  const bool more = blocks_of_lane(rows.a.blocks, step.pair) > step.first + kAtOnce;
  const LaneBlocks lanes[2] = {{rows, step.pair, step.first, products.of[0]},
                               {rows, step.pair + kPairs, step.first, products.of[1]}};
  for (int64_t row = 0; row < kTile; row += kRows) {
    __m512 of_lane[2][kRows];
    DYMOE_UNROLL for (int h = 0; h < 2; ++h) {
      __m512 total[kRows], correction[kRows];
      DYMOE_UNROLL for (int r = 0; r < kRows; ++r) {
        total[r] = step.first ? sums.sums[h][row + r] : _mm512_setzero_ps();
        correction[r] = step.first ? sums.corrections[h][row + r] : _mm512_setzero_ps();
      }
      const float *sizes = lanes[h].sizes + row * pitch, *scales = lanes[h].scales, *token_sums = lanes[h].sums;
      for (int64_t i = 0; i < lanes[h].count; ++i, sizes += Amx::lanes, scales += next, token_sums += next) {
        const __m512 of_tokens = _mm512_loadu_ps(scales), sum = _mm512_loadu_ps(token_sums);
        DYMOE_UNROLL for (int r = 0; r < kRows; ++r) {
          const __m512 own = _mm512_set1_ps(sizes[r * pitch]);
          const __m512i whole = _mm512_load_si512(lanes[h].products[i][row + r]);
          total[r] = _mm512_fmadd_ps(_mm512_mul_ps(own, of_tokens), _mm512_cvtepi32_ps(whole), total[r]);
          correction[r] = _mm512_fmadd_ps(own, sum, correction[r]);
        }
      }
      DYMOE_UNROLL for (int r = 0; r < kRows; ++r) {
        if (more) sums.sums[h][row + r] = total[r], sums.corrections[h][row + r] = correction[r];
        of_lane[h][r] = _mm512_fmadd_ps(rows.off_centre, correction[r], total[r]);
      }
    }
    if (more) continue;
    // In the order of Amx::sum, which adds up the lanes of a token that comes alone.
    int level = 0;
    DYMOE_UNROLL for (int r = 0; r < kRows; ++r) of_lane[0][r] = _mm512_add_ps(of_lane[0][r], of_lane[1][r]);
    for (; step.pair >> level & 1; ++level)
      DYMOE_UNROLL for (int r = 0; r < kRows; ++r) of_lane[0][r] =
          _mm512_add_ps(sums.tree[level][row + r], of_lane[0][r]);
    DYMOE_UNROLL for (int r = 0; r < kRows; ++r) sums.tree[level][row + r] = of_lane[0][r];
  }
}

/// Writes v [row, token] to y [token, row], of which `tokens` and `count` are wanted.
void store_transposed(const __m512 (&v)[kTile], int64_t count, int64_t tokens, float* y, int64_t stride) {
  __m512 pairs[kTile];
  DYMOE_UNROLL for (int i = 0; i < kTile; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]), pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  // fours[c][q] has in lane j: rows 4 q to 4 q + 3 of token 4 j + c.
  __m512i fours[4][4];
  DYMOE_UNROLL for (int q = 0; q < 4; ++q) DYMOE_UNROLL for (int half = 0; half < 2; ++half) {
    const __m512d a = _mm512_castps_pd(pairs[4 * q + half]), b = _mm512_castps_pd(pairs[4 * q + half + 2]);
    fours[2 * half][q] = _mm512_castpd_si512(_mm512_unpacklo_pd(a, b));
    fours[2 * half + 1][q] = _mm512_castpd_si512(_mm512_unpackhi_pd(a, b));
  }
  DYMOE_UNROLL for (int c = 0; c < 4; ++c) {
    transpose_lanes(fours[c]);
    DYMOE_UNROLL for (int j = 0; j < 4; ++j) if (4 * j + c < tokens)
        _mm512_mask_storeu_epi32(y + (4 * j + c) * stride, __mmask16((1u << count) - 1), fours[c][j]);
  }
}

/// Computes y of at most kTile rows and kTile tokens.
void multiply_tokens_of_tile(const MatrixView& m, const TileRows& rows, int64_t row, int64_t count, int64_t tokens,
                             float* y, int64_t stride) {
  Products products[2];
  Unfinished sums;
  const auto after = [&](TileStep step) {
    step.first += kAtOnce;
    return step.first < blocks_of_lane(m.blocks, step.pair) ? step : TileStep{step.pair + 1, 0};
  };
  // Tiles are multiplied one step ahead, while the products of the step before are scaled.
  TileStep step{0, 0};
  multiply_step(rows, step, products[0]);
  for (int turn = 0; step.pair < kPairs; turn ^= 1) {
    const TileStep next = after(step);
    if (next.pair < kPairs) multiply_step(rows, next, products[turn ^ 1]);
    add_step(rows, step, products[turn], sums);
    step = next;
  }
  __m512 out[kTile];
  for (int64_t r = 0; r < kTile; ++r)
    out[r] = _mm512_mul_ps(sums.tree[3][r], _mm512_set1_ps(r < count ? row_scale(m, row + r) : 0.0f));
  store_transposed(out, count, tokens, y, stride);
}

void Amx::multiply_transposed(const MatrixView& m, const Activations& a, int64_t row, int64_t count, const float* sizes,
                              float* y, int64_t stride, uint8_t* codes) {
  static_assert(unpacked_rows == kTile && unpacked_rows == kScratchRows, "tiles of rows that have memory");
  part_blocks(count * codes_pitch(m.blocks), codes);
  // GCC does not know that loading a tile reads memory. It knows that storing one writes it.
  asm volatile("" ::: "memory");
  for (int64_t token = 0; token < a.tokens; token += kTile) {
    const TileRows rows{codes, sizes, a, token, _mm512_set1_ps(-m.levels.centre)};
    multiply_tokens_of_tile(m, rows, row, count, smaller(kTile, a.tokens - token), y + token * stride + row, stride);
  }
}

/// The shapes of the eight tiles, as LDTILECFG reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};

/// See Kernels::product. Threads keep no tiles between products, because the system would have to save them.
void product_in_tiles(const MatrixView& m, const Activations& a, int64_t begin, int64_t end, float* y, int64_t stride,
                      uint8_t* scratch) {
  const bool tiles = a.transposed_codes && a.tokens >= Amx::transposed_from && m.grid != Grid::mxfp4;
  static constexpr TileShapes kShapes;
  if (tiles) _tile_loadconfig(&kShapes);
  product<Amx, HalvedAvx512>(m, a, begin, end, y, stride, scratch);
  if (tiles) _tile_release();
}

constexpr Kernels with_tiles(Kernels kernels) {
  kernels.product = product_in_tiles;
  return kernels;
}

}  // namespace

const Kernels kAmx = with_tiles(make_kernels<Amx, HalvedAvx512>("amx"));

}  // namespace dymoe

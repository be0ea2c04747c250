// The kernels in portable C++, the reference for the other instruction sets.
#include "isa/isa.h"
#include "templates/product.h"

namespace dymoe {
namespace {

struct Scalar {
  struct Codes {
    uint8_t code[kBlock];
  };
  using Lanes = float;

  static constexpr int64_t at_once = 1, scales = 1;
  static constexpr int lanes = 1;
  static constexpr int direct_rows = 1, direct_step = 1, tile_rows = 1, tile_tokens = 1;
  static constexpr int direct_tokens = 1;
  template <bool Wide>
  static constexpr int direct_most = 1;
  static constexpr bool pairs = false, folds = false;
  static constexpr int64_t unpacked_rows = 8;
  template <int... Widths>
  static constexpr bool merges = false;
  template <bool Wide>
  static constexpr float offset = 0.0f;

  template <int W>
  static Codes load(const uint8_t* plane, int64_t = 1) {
    Codes codes;
    if constexpr (W == 1) {
      for (int i = 0; i < kBlock; ++i) codes.code[i] = (plane[i / 8] >> (i % 8)) & 1;
    } else {
      constexpr int bytes = 8 * W;
      for (int k = 0; k < 8 / W; ++k)
        for (int i = 0; i < bytes; ++i) codes.code[k * bytes + i] = (plane[i] >> (W * k)) & ((1 << W) - 1);
    }
    return codes;
  }

  template <int W>
  static Codes append(Codes codes, const uint8_t* plane, int64_t) {
    const Codes bits = load<W>(plane);
    for (int i = 0; i < kBlock; ++i) codes.code[i] = uint8_t(codes.code[i] << W) | bits.code[i];
    return codes;
  }

  using Table = const uint8_t*;
  static Table load_table(const uint8_t* numbers) { return numbers; }
  static Codes look_up(Codes codes, Table table) {
    for (uint8_t& code : codes.code) code = table[code];
    return codes;
  }

  struct Bytes {
    uint8_t byte[16];
  };
  template <class F>
  static Bytes each(F make) {
    Bytes out;
    for (int i = 0; i < 16; ++i) out.byte[i] = uint8_t(make(i));
    return out;
  }
  static Bytes load_bytes(const uint8_t* p, int64_t) {
    return each([&](int i) { return p[i]; });
  }
  static Bytes load_table16(const uint8_t* p) { return load_bytes(p, 1); }
  static Bytes exclusive_or(const Bytes& a, const Bytes& b) {
    return each([&](int i) { return a.byte[i] ^ b.byte[i]; });
  }
  template <int Mask>
  static Bytes choose_bits(const Bytes& a, const Bytes& b) {
    return each([&](int i) { return (a.byte[i] & Mask) | (b.byte[i] & ~Mask); });
  }
  static Bytes low_nibbles(const Bytes& v) {
    return each([&](int i) { return v.byte[i] & 15; });
  }
  static Bytes high_nibbles(const Bytes& v) {
    return each([&](int i) { return v.byte[i] >> 4; });
  }
  static Bytes shuffle(const Bytes& table, const Bytes& indices) {
    return each([&](int i) { return table.byte[indices.byte[i]]; });
  }
  static Bytes add_bytes(const Bytes& a, const Bytes& b) {
    return each([&](int i) { return a.byte[i] + b.byte[i]; });
  }
  static Bytes& part(Codes& codes, int k) { return *reinterpret_cast<Bytes*>(codes.code + 16 * k); }

  static void store(uint8_t* out, const Codes& codes) { std::memcpy(out, codes.code, kBlock); }

  static Codes load_stored(const uint8_t* p) { return load<8>(p); }

  using Tokens = const int8_t*;
  static Tokens load_tokens(const int8_t* p) { return p; }
  template <bool Wide>
  static Lanes dot(const Codes& codes, Tokens a) {
    int32_t total = 0;
    for (int i = 0; i < kBlock; ++i) total += int32_t(codes.code[i]) * a[i];
    return float(total);
  }

  template <bool Wide, int Rows, int Count>
  static void dots(const Codes (&codes)[Rows], const Tokens (&a)[Count], Lanes (&out)[Rows][Count]) {
    each_dot<Scalar, Wide>(codes, a, out);
  }

  static Lanes zero() { return 0.0f; }
  static Lanes broadcast(float value) { return value; }
  static Lanes load_scales(const float* p) { return broadcast(*p); }
  static Lanes load_floats(const float* p) { return *p; }
  static Lanes load_scale_sizes(const float* sizes, uint64_t word) { return sizes[word & 15]; }
  static void store_floats(float* p, Lanes v) { *p = v; }
  static Lanes multiply(Lanes a, Lanes b) { return a * b; }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
  template <int Rows>
  static void sum(const Lanes (&v)[Rows], float (&out)[Rows]) {
    for (int r = 0; r < Rows; ++r) out[r] = v[r];
  }
};

struct HalvedScalar : Scalar {
  typedef float Lanes __attribute__((vector_size(8)));

  static constexpr int64_t scales = 2;
  static constexpr int lanes = 2;

  template <bool Wide>
  static Lanes dot(const Codes& codes, Tokens a) {
    int32_t totals[2] = {};
    for (int i = 0; i < kBlock; ++i) totals[i / kHalf] += int32_t(codes.code[i]) * a[i];
    return Lanes{float(totals[0]), float(totals[1])};
  }

  template <bool Wide, int Rows, int Count>
  static void dots(const Codes (&codes)[Rows], const Tokens (&a)[Count], Lanes (&out)[Rows][Count]) {
    each_dot<HalvedScalar, Wide>(codes, a, out);
  }

  static Lanes zero() { return broadcast(0.0f); }
  static Lanes broadcast(float value) { return Lanes{value, value}; }
  static Lanes load_scales(const float* p) { return broadcast(*p); }
  static Lanes load_half_scales(const float* p) { return load_floats(p); }
  static Lanes load_floats(const float* p) { return Lanes{p[0], p[1]}; }
  static Lanes load_scale_sizes(const float* sizes, uint64_t word) {
    return Lanes{sizes[word & 15], sizes[(word >> 4) & 15]};
  }
  static void store_floats(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }
  static Lanes multiply(Lanes a, Lanes b) { return a * b; }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
  template <int Rows>
  static void sum(const Lanes (&v)[Rows], float (&out)[Rows]) {
    for (int r = 0; r < Rows; ++r) out[r] = v[r][0] + v[r][1];
  }
};

}  // namespace

const Kernels kScalar = make_kernels<Scalar, HalvedScalar>("scalar");

}  // namespace dymoe

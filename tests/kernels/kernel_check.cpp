// Holds the kernels of every instruction set of this machine against the scalar ones, over splits, shapes and numbers
// of tokens, and a decoded token against the operations that it goes through, in buffers of exactly the size that they
// need; and sees that threads read what they are asked to. Prints one line for each instruction set and one for the
// rest; exits with 1 where one is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "check_reads.h"
#include "check_stack.h"
#include "check_token.h"
#include "isa/isa.h"
#include "ops/attention.h"
#include "ops/delta.h"
#include "ops/moe.h"
#include "ops/ops.h"
#include "ops/router.h"
#include "ops/workspace.h"
#include "templates/half.h"
#include "threads/pool.h"

namespace dymoe {
namespace {

/// Tokens quantized by `isa`, in buffers of their own.
struct Quantized {
  QuantizedTokens buffers;
  Activations view;

  Quantized(const Kernels& isa, const std::vector<float>& x, int64_t tokens, int64_t cols) {
    std::vector<std::vector<float>> rows;  // each in memory of its own, so that sanitizers see reads past its end
    for (int64_t t = 0; t < tokens; ++t) rows.emplace_back(x.begin() + t * cols, x.begin() + (t + 1) * cols);
    view = buffers.quantize(isa, tokens, cols, [&](int64_t t) { return rows[t].data(); });
  }
};

/// The codes of all tokens, column by column.
std::vector<int8_t> codes_of(const Kernels& isa, const Quantized& a) {
  std::vector<int8_t> codes;
  for (int64_t t = 0; t < a.view.tokens; ++t)
    for (int64_t i = 0; i < a.view.blocks * kBlock; ++i)
      codes.push_back(a.view.codes[t * codes_pitch(a.view.blocks) + place(isa.at_once, i / kBlock, i % kBlock)]);
  return codes;
}

std::vector<float> product_of(const Kernels& isa, const Matrix& m, const Activations& a) {
  std::vector<float> y(a.tokens * m.view.rows);
  const auto scratch = buffer<uint8_t>(scratch_bytes(m.view.blocks));
  const int64_t middle = m.view.rows / 3;
  isa.product(m.view, a, 0, middle, y.data(), m.view.rows, scratch.get());
  isa.product(m.view, a, middle, m.view.rows, y.data(), m.view.rows, scratch.get());
  return y;
}

std::vector<float> rows_of(const Kernels& isa, const Matrix& m) {
  std::vector<float> out(m.view.rows * m.view.cols);
  const auto scratch = buffer<uint8_t>(scratch_bytes(m.view.blocks));
  for (int64_t r = 0; r < m.view.rows; ++r) isa.dequantize(m.view, r, out.data() + r * m.view.cols, scratch.get());
  return out;
}

/// A product, and what the scalar kernels make of it.
struct ProductCase {
  Matrix matrix;
  int64_t tokens;
  std::vector<float> x, product, rows;
  std::string what;

  ProductCase(Grid grid, const std::vector<int>& split, int bits, int64_t row_count, int64_t cols, int64_t token_count)
      : matrix(row_count, cols, split, bits <= kMaxCurved ? kMaxCurved : bits, kOne, grid),
        tokens(token_count),
        x(random_floats(tokens * cols)),
        product(product_of(kScalar, matrix, Quantized(kScalar, x, tokens, cols).view)),
        rows(tokens == 1 ? rows_of(kScalar, matrix) : std::vector<float>()) {
    what = (grid == Grid::mxfp4     ? "MXFP4, "
            : grid == Grid::trellis ? "trellis, "
                                    : "") +
           std::to_string(bits) + " bits, " + std::to_string(row_count) + " x " + std::to_string(cols) + ", " +
           std::to_string(tokens) + " tokens";
  }
};

std::vector<ProductCase> make_product_cases() {
  const std::vector<std::vector<int>> splits = {{2},    {2, 1},       {2, 1, 1},      {2, 1, 1, 4}, {2, 2},
                                                {4},    {4, 2},       {4, 2, 1},      {8},          {1, 1, 1},
                                                {4, 1}, {2, 1, 1, 1}, {2, 1, 1, 1, 1}};
  const int64_t shapes[][2] = {{1, 1},   {7, 64},  {19, 150}, {16, 1024}, {9, 1085}, {37, 200}, {5, 100},
                               {11, 33}, {6, 300}, {3, 430},  {4, 820},   {263, 70}, {2, 4200}};
  std::vector<ProductCase> cases;
  for (const Grid grid : {Grid::usual, Grid::mxfp4, Grid::trellis})
    for (const auto& split : splits) {
      const int bits = std::accumulate(split.begin(), split.end(), 0);
      if (grid == Grid::mxfp4 && bits > kMaxCurved) continue;
      // Its planes are one of two bits and then those of one.
      const bool is_coded = split[0] == 2 && std::count(split.begin(), split.end(), 1) + 1 == int64_t(split.size());
      if (grid == Grid::trellis && !is_coded) continue;
      for (const auto& [rows, cols] : shapes) {
        if (grid != Grid::usual && cols == 1) continue;  // its only weight may be 0, and then no product is close
        for (const int64_t tokens : {0, 1, 2, 4, 5, 12, 33}) cases.emplace_back(grid, split, bits, rows, cols, tokens);
      }
    }
  return cases;
}

void check_products(const Kernels& isa) {
  static const std::vector<ProductCase> cases = make_product_cases();
  for (const ProductCase& c : cases) {
    const int64_t rows = c.matrix.view.rows, cols = c.matrix.view.cols;
    const Quantized all(isa, c.x, c.tokens, cols);
    const std::vector<float> y = product_of(isa, c.matrix, all.view);
    expect(is_close(y, c.product), isa.name, c.what);
    if (isa.name == std::string("i8mm")) {
      const Kernels& neon = find_isa("neon");
      expect(y == product_of(neon, c.matrix, Quantized(neon, c.x, c.tokens, cols).view), isa.name,
             c.what + ": bits of NEON");
    }
    for (int64_t t = 0; t < c.tokens; t += 3) {
      const Quantized one(isa, {c.x.begin() + t * cols, c.x.begin() + (t + 1) * cols}, 1, cols);
      const std::vector<float> alone = product_of(isa, c.matrix, one.view);
      expect(std::equal(alone.begin(), alone.end(), y.begin() + t * rows), isa.name, c.what + ": a token alone");
    }
    for (const int64_t count : {3, 10, 19}) {
      if (c.tokens < count + 2) continue;
      const std::vector<float> some = product_of(isa, c.matrix, some_tokens(all.view, 2, count));
      expect(std::equal(some.begin(), some.end(), y.begin() + 2 * rows), isa.name, c.what + ": some of the tokens");
    }
    if (c.tokens == 1) expect(rows_of(isa, c.matrix) == c.rows, isa.name, c.what + ": dequantize");
    if (c.tokens != 12) continue;
    std::vector<float> bad = c.x;
    bad[5 * cols] = NAN;
    const std::vector<float> spoilt = product_of(isa, c.matrix, Quantized(isa, bad, c.tokens, cols).view);
    bool own = true;
    for (int64_t i = 0; i < c.tokens * rows; ++i)
      own = own && (i / rows == 5 ? std::isnan(spoilt[i]) : spoilt[i] == y[i]);
    expect(own, isa.name, c.what + ": a token that is not finite spoils itself alone");
  }
}

void check_quantize(const Kernels& isa) {
  for (const int64_t cols : {1, 64, 150, 1100}) {
    std::vector<float> x = random_floats(3 * cols);
    x[cols] = NAN;
    const Quantized a(isa, x, 3, cols), b(kScalar, x, 3, cols);
    const int64_t bytes = a.view.pitch * 3 * int64_t(sizeof(float));
    expect(codes_of(isa, a) == codes_of(kScalar, b) && !std::memcmp(a.view.scales, b.view.scales, kCopies * bytes) &&
               !std::memcmp(a.view.sums, b.view.sums, bytes) &&
               !std::memcmp(a.view.half_sums, b.view.half_sums, 2 * bytes),
           isa.name, "quantize, " + std::to_string(cols) + " columns");
  }
}

void check_vectors(const Kernels& isa) {
  for (const int64_t n : {2, 16, 20, 64, 100, 128}) {
    const std::vector<float> x = random_floats(n), rows = random_floats(11 * n);
    std::vector<float> norms[2], layer_norms[2], dots[2];
    int at = 0;
    for (const Kernels* kernels : {&isa, &kScalar}) {
      norms[at].resize(n), layer_norms[at].resize(n), dots[at].resize(11);
      kernels->norm(x.data(), rows.data(), n, 1e-5f, norms[at].data());
      kernels->layer_norm(x.data(), rows.data(), rows.data() + n, n, 1e-5f, layer_norms[at].data());
      kernels->dots(rows.data(), n, 0, 11, x.data(), dots[at].data());
      ++at;
    }
    expect(norms[0] == norms[1] && layer_norms[0] == layer_norms[1] && dots[0] == dots[1], isa.name,
           "vectors of " + std::to_string(n));
  }
  for (const Activation activation :
       {Activation{ActivationKind::silu}, Activation{ActivationKind::gelu}, Activation{ActivationKind::gelu_tanh},
        Activation{ActivationKind::clamped_swiglu, 1.7f, 0.8f}}) {
    const std::vector<float> ups = random_floats(37), hidden = random_floats(37);
    std::vector<float> a = hidden, b = hidden;
    isa.activate(activation, 37, ups.data(), a.data());
    kScalar.activate(activation, 37, ups.data(), b.data());
    expect(is_close(a, b), isa.name, "activation");
  }
}

/// Half precision as the hardware has it, and rounding to it.
void check_halves(const Kernels& isa) {
  const int64_t n = 65536;
  const auto keys = buffer<uint8_t>(2 * n), values = buffer<uint8_t>(2 * n);
  const auto score = buffer<float>(2), row = buffer<float>(kCacheRows * n), out = buffer<float>(n);
  const std::vector<float> query(n);
  for (int64_t h = 0; h < n; ++h) {
    const uint16_t half = uint16_t(h), zero = 0;
    std::memcpy(values.get() + 2 * h, &half, 2), std::memcpy(keys.get() + 2 * h, &zero, 2);
  }
  isa.attend(query.data(), 1, {keys.get(), values.get(), 2 * n, 16}, 1, n, nullptr, score.get(), row.get(), out.get());
  bool same = true, rounded = true;
  for (int64_t h = 0; h < n; ++h) {
    const float value = half_to_float(uint16_t(h)), next = half_to_float(uint16_t(h + 1));
    same &= value == out[h] || (std::isnan(value) && std::isnan(out[h]));
    if (!std::isfinite(value)) continue;
    rounded &= float_to_half(value) == h;
    if (std::isfinite(next)) rounded &= float_to_half(0.5f * (value + next)) == (h % 2 ? h + 1 : h);
  }
  expect(same, isa.name, "half to float");
  expect(rounded && float_to_half(1e9f) == 0x7bff && std::isnan(half_to_float(float_to_half(NAN))), isa.name,
         "float to half");
}

/// Rows of the cache, of what is small, large and not finite too.
void check_rows(const Kernels& isa) {
  for (const int64_t n : {2, 20, 64, 100, 128})
    for (const int bits : {8, 16, 32})
      for (const float size : {0.0f, 1e-7f, 1e-4f, 1.0f, 1e6f, INFINITY, NAN}) {
        std::vector<float> x = random_floats(n);
        x[n / 2] = size;
        if (std::isfinite(size))
          for (float& value : x) value *= size;
        const int64_t bytes = cache_row_bytes(n, bits);
        const auto a = buffer<uint8_t>(bytes), b = buffer<uint8_t>(bytes);
        isa.pack_row(x.data(), n, bits, a.get());
        kScalar.pack_row(x.data(), n, bits, b.get());
        bool same = true;
        for (int64_t i = 0; i < bytes; i += 2) {
          uint16_t left, right;
          std::memcpy(&left, a.get() + i, 2), std::memcpy(&right, b.get() + i, 2);
          same &= left == right || (bits < 32 && std::isnan(half_to_float(left)) && std::isnan(half_to_float(right)));
        }
        expect(same, isa.name, "a row of " + std::to_string(n) + " at " + std::to_string(bits) + " bits");
      }
}

/// A prompt after some tokens, its last token by itself, at all widths of the cache.
void check_attention(const Kernels& isa) {
  struct Case {
    int64_t heads, kv_heads, n, start, tokens, window, chunk;
    bool sinks;
  };
  for (const Case& c :
       {Case{4, 2, 64, 0, 70, 0, 0, false}, Case{3, 1, 20, 90, 45, 0, 0, true}, Case{2, 2, 128, 30, 66, 40, 0, true},
        Case{4, 2, 20, 30, 66, 0, 32, false}, Case{6, 2, 64, 70, 50, 20, 64, true}, Case{1, 1, 2, 0, 1, 0, 0, false},
        Case{20, 1, 64, 30, 5, 0, 0, true}, Case{2, 1, 256, 10, 30, 0, 0, false}, Case{3, 3, 96, 15, 18, 0, 0, true},
        Case{2, 1, 32, 0, 9, 0, 0, false}})
    for (const int bits : {8, 16, 32}) {
      const int64_t end = c.start + c.tokens, pitch = cache_row_bytes(c.n, bits), group = c.heads / c.kv_heads;
      const auto keys = buffer<uint8_t>(c.kv_heads * end * pitch), values = buffer<uint8_t>(c.kv_heads * end * pitch);
      const LayerCache cache{keys.get(), values.get(), end, bits};
      // attend_codes rounds queries and weights to 16 bits.
      const float share = bits == 8 && c.n % kCacheGroup == 0 ? 2e-4f : 1e-5f;
      for (int64_t row = 0; row < c.kv_heads * end; ++row) {
        isa.pack_row(random_floats(c.n).data(), c.n, bits, keys.get() + row * pitch);
        isa.pack_row(random_floats(c.n).data(), c.n, bits, values.get() + row * pitch);
      }
      const std::vector<float> sinks = random_floats(c.heads);
      const Prompt prompt{c.tokens,
                          c.heads,
                          c.kv_heads,
                          c.n,
                          c.start,
                          c.window,
                          std::min<int64_t>(c.tokens, 32),
                          c.chunk,
                          c.sinks ? sinks.data() : nullptr};
      const std::vector<float> queries = random_floats(c.tokens * c.heads * c.n);
      std::vector<float> prompts[2], masses[2], tokens[2];
      int at = 0;
      for (const Kernels* kernels : {&isa, &kScalar}) {
        const int64_t parts = receiving_parts(*kernels, prompt);
        std::vector<float> out(queries.size()), received(parts * c.tokens), mass(c.tokens);
        attend_prompt(*kernels, prompt, queries.data(), cache, out.data(), received.data());
        for (int64_t i = 0; i < parts * c.tokens; ++i) mass[i % c.tokens] += received[i];
        prompts[at] = out, masses[at] = mass;
        Prompt last = prompt;
        last.tokens = 1, last.start = end - 1, last.last = 0;
        const int64_t before = (c.tokens - 1) * c.heads * c.n;
        tokens[at].resize(c.heads * c.n);
        attend_token(*kernels, last, queries.data() + before, cache, tokens[at].data());
        expect(is_close(tokens[at], {out.begin() + before, out.end()}, share), kernels->name,
               "a token, as of a prompt");
        const auto scores = buffer<float>(group * (end + 1)), row = buffer<float>(kCacheRows * c.n);
        std::vector<float> alone(group * c.n);
        kernels->attend(queries.data(), group, rows_from(cache, c.kv_heads - 1, 0, c.n), end, c.n, prompt.sinks,
                        scores.get(), row.get(), alone.data());
        tokens[at].insert(tokens[at].end(), alone.begin(), alone.end());
        ++at;
      }
      const std::string what = std::to_string(c.tokens) + " tokens, " + std::to_string(bits) + " bits";
      expect(is_close(prompts[0], prompts[1]) && is_close(masses[0], masses[1]), isa.name, "prompt of " + what);
      expect(is_close(tokens[0], tokens[1], share), isa.name, "token after " + what);
    }
}

/// The attention of two heads to 40 keys and values of 8 bits; those of the cache are `keys` and `values` [40, n].
std::vector<float> attended(const Kernels& isa, int64_t n, const std::vector<float>& queries,
                            const std::vector<float>& keys, const std::vector<float>& values, const float* sinks) {
  const int64_t count = keys.size() / n, pitch = cache_row_bytes(n, 8);
  const auto packed_keys = buffer<uint8_t>(count * pitch), packed_values = buffer<uint8_t>(count * pitch);
  for (int64_t row = 0; row < count; ++row) {
    isa.pack_row(keys.data() + row * n, n, 8, packed_keys.get() + row * pitch);
    isa.pack_row(values.data() + row * n, n, 8, packed_values.get() + row * pitch);
  }
  const auto scores = buffer<float>(2 * (count + 1)), rows = buffer<float>(kCacheRows * n), out = buffer<float>(2 * n);
  isa.attend(queries.data(), 2, {packed_keys.get(), packed_values.get(), pitch, 8}, count, n, sinks, scores.get(),
             rows.get(), out.get());
  return {out.get(), out.get() + 2 * n};
}

/// Attention that is uneven or not finite, with keys and values of 8 bits.
void check_extreme_attention(const Kernels& isa) {
  const int64_t n = 128, count = 40;
  const std::vector<float> queries = random_floats(2 * n), keys = random_floats(count * n);
  const std::vector<float> values = random_floats(count * n);
  const auto both = [&](const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v,
                        const float* sinks, const char* what) {
    const std::vector<float> ours = attended(isa, n, q, k, v, sinks), plain = attended(kScalar, n, q, k, v, sinks);
    std::vector<float> finite_ours, finite_plain;
    bool alike = true;
    for (size_t i = 0; i < ours.size(); ++i) {
      alike &= std::isfinite(ours[i]) == std::isfinite(plain[i]);
      if (std::isfinite(ours[i]) && std::isfinite(plain[i]))
        finite_ours.push_back(ours[i]), finite_plain.push_back(plain[i]);
    }
    expect(alike && is_close(finite_ours, finite_plain, 2e-4f), isa.name, what);
  };
  // Nearly all weight is on a key whose value is small, as on the first token of most texts.
  std::vector<float> first = keys, small = values;
  for (int64_t i = 0; i < n; ++i) first[i] = 0.6f * (queries[i] + queries[n + i]), small[i] *= 0.001f;
  both(queries, first, small, nullptr, "a key with most of the weight");
  // One group of columns is much larger than the others.
  std::vector<float> large = values;
  for (int64_t i = 0; i < count * n; ++i) large[i] *= i % n < 32 ? 1000.0f : 1.0f;
  const std::vector<float> mixed = attended(isa, n, queries, keys, large, nullptr);
  const std::vector<float> plain = attended(kScalar, n, queries, keys, large, nullptr);
  expect(is_close({mixed.begin() + 32, mixed.begin() + n}, {plain.begin() + 32, plain.begin() + n}, 2e-4f), isa.name,
         "small columns beside large ones");
  for (const float odd : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    std::vector<float> q = queries, k = keys, v = values;
    q[n + 3] = k[17 * n + 40] = v[33 * n + 70] = odd;
    both(q, keys, values, nullptr, "a query that is not finite");
    both(queries, k, values, nullptr, "a key that is not finite");
    both(queries, keys, v, nullptr, "a value that is not finite");
  }
  const std::vector<float> sinks = {30.0f, std::nanf("")};
  both(queries, keys, values, sinks.data(), "sinks");
  both(std::vector<float>(2 * n), keys, values, nullptr, "queries of zeros");
}

/// What the gated delta rule makes of some tokens, in as many calls as there are numbers: y, then the state.
std::vector<float> delta_by(const Kernels& isa, const DeltaShape& shape, const std::vector<int64_t>& calls) {
  random_bits.seed(1);
  const int64_t tokens = std::accumulate(calls.begin(), calls.end(), int64_t(0)), heads = shape.value_heads;
  const int64_t channels = channels_of(shape), values = values_of(shape);
  const std::vector<float> mixed = random_floats(tokens * channels), rates = random_floats(tokens * 2 * heads),
                           conv = random_floats(channels * shape.taps), a_log = random_floats(heads),
                           dt_bias = random_floats(heads);
  std::vector<float> tail = random_floats((shape.taps - 1) * channels),
                     memory = random_floats(heads * shape.key_dim * shape.value_dim), all;
  int64_t first = 0;
  for (int64_t count : calls) {
    const auto own = buffer<float>(count * channels), own_rates = buffer<float>(count * 2 * heads),
               y = buffer<float>(count * values);
    std::copy_n(mixed.begin() + first * channels, count * channels, own.get());
    std::copy_n(rates.begin() + first * 2 * heads, count * 2 * heads, own_rates.get());
    gated_delta(isa, shape, count, own.get(), own_rates.get(), {conv.data(), a_log.data(), dt_bias.data()},
                {tail.data(), memory.data()}, y.get());
    all.insert(all.end(), y.get(), y.get() + count * values);
    first += count;
  }
  all.insert(all.end(), tail.begin(), tail.end());
  all.insert(all.end(), memory.begin(), memory.end());
  return all;
}

/// The gated delta rule by any instruction set, and however its tokens are divided into calls.
void check_delta(const Kernels& isa) {
  for (const DeltaShape& shape :
       {DeltaShape{1, 2, 20, 150, 4}, DeltaShape{2, 2, 128, 64, 3}, DeltaShape{1, 1, 3, 5, 1}}) {
    const std::vector<float> whole = delta_by(isa, shape, {70});
    expect(is_close(whole, delta_by(kScalar, shape, {70})), isa.name, "gated delta rule");
    expect(whole == delta_by(isa, shape, {1, 1, 2, 65, 1}), isa.name, "gated delta rule in parts");
  }
  expect_refused([] { check(DeltaShape{2, 3, 4, 4, 4}); }, isa.name, "heads that do not share keys");
  expect_refused([] { check(DeltaShape{1, 1, 4, 4, kMaxTaps + 1}); }, isa.name, "more taps than there can be");
}

/// Routers with and without options.
void check_routes(const Kernels& isa) {
  const int64_t experts = 24, top_k = 5;
  const std::vector<float> select = random_floats(experts), scale = random_floats(experts);
  for (const RouterScore score :
       {RouterScore::softmax, RouterScore::sigmoid, RouterScore::softmax_of_chosen, RouterScore::sparsemixer})
    for (const bool all : {false, true}) {
      RouterRule rule{experts, top_k, score, 1, 1, true, true, 1.0f, 0.0f, 0.0f, 0.0f, nullptr, nullptr, 0.0f};
      if (all)
        rule = {experts, top_k, score, 6, 2, true, true, 2.0f, 1e-3f, 0.5f, 3.0f, select.data(), scale.data(), 0.5f};
      check(rule);
      const std::vector<float> logits = random_floats(experts);
      std::vector<int64_t> chosen[2];
      std::vector<float> weights[2];
      int at = 0;
      for (const Kernels* kernels : {&isa, &kScalar}) {
        std::vector<float> used = logits;
        chosen[at].resize(top_k), weights[at].resize(top_k);
        select_experts(*kernels, rule, used.data(), chosen[at].data(), weights[at].data());
        ++at;
      }
      expect(chosen[0] == chosen[1] && weights[0] == weights[1], isa.name, "routing");
      expect(std::is_sorted(weights[0].rbegin(), weights[0].rend()), isa.name, "order of experts");
    }
}

/// Rotation of some columns of each head.
void check_rotate(const char* whose) {
  const int64_t tokens = 3, heads = 2, n = 10, turning = 6;
  const std::vector<float> x = random_floats(tokens * heads * n), cosines = random_floats(tokens * turning),
                           sines = random_floats(tokens * turning);
  std::vector<float> got = x, expected = x;
  rotate(got.data(), tokens, heads, n, turning, cosines.data(), sines.data());
  for (int64_t i = 0; i < tokens * heads; ++i)
    for (int64_t c = 0; c < turning; ++c) {
      const int64_t angle = i / heads * turning + c, pair = (c + turning / 2) % turning;
      const float turned = c < turning / 2 ? -x[i * n + pair] : x[i * n + pair];
      expected[i * n + c] = x[i * n + c] * cosines[angle] + turned * sines[angle];
    }
  expect(is_close(got, expected), whose, "rotation");
}

/// Codes and scales of a fit, then of a descent from them.
std::vector<float> quantized_by(const Kernels& isa, unsigned seed) {
  random_bits.seed(seed);
  const int64_t rows = 19, cols = 51;
  const std::vector<float> weight = random_floats(rows * cols), importance(cols, 1.0f);
  std::vector<float> start(2 * rows), scales(3 * rows), slope(3 * rows * cols, 0.01f), error(3 * rows * cols);
  for (float& s : start) s = 0.05f * float(1 + random_bits() % 8);
  std::vector<uint8_t> codes(rows * cols);
  Fit fit{};
  fit.tiers = 3, fit.rows = rows, fit.cols = cols, fit.starts = 2;
  Descent d{};
  d.tiers = 3, d.rows = rows, d.cols = d.pitch = d.hessian_pitch = cols, d.last = true;
  for (int t = 0; t < 3; ++t) fit.bits[t] = d.bits[t] = t + 2, fit.weights[t] = d.weights[t] = 1.0f;
  fit.weight = weight.data(), fit.importance = importance.data(), fit.start = start.data();
  fit.scales = scales.data(), fit.codes = codes.data();
  isa.fit(fit, 0, 16), isa.fit(fit, 16, rows - 16);
  std::vector<float> hessian(cols * cols, 0.1f);
  for (int64_t i = 0; i < cols; ++i) hessian[i * (cols + 1)] = 1.0f;
  d.hessian = hessian.data(), d.slope = slope.data(), d.scales = scales.data();
  d.error = error.data(), d.codes = codes.data();
  const auto scratch = buffer<uint8_t>(isa.descent_bytes + 64);
  uint8_t* aligned = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64) % 64;
  isa.descend(d, 0, 16, aligned), isa.descend(d, 16, rows - 16, aligned);
  // On the trellis grid from the weights on.
  d.trellis = true, d.last = false;
  for (float& e : error) e = 0.0f;
  for (const float* from : {weight.data(), static_cast<const float*>(nullptr), static_cast<const float*>(nullptr)}) {
    d.weight = from;
    isa.descend(d, 0, rows, aligned);
    d.last = !from;
  }
  std::vector<float> all(codes.begin(), codes.end());
  all.insert(all.end(), scales.begin(), scales.end());
  all.insert(all.end(), error.begin(), error.end());
  return all;
}

/// A layer's experts by threads: the same bits as by one.
void check_threads(const Kernels& isa) {
  const Matrix gate(320, 512, {2, 1, 1}, 4), up(320, 512, {2, 1, 1}, 4), down(512, 320, {2, 1, 1}, 4);
  const Matrix low(320, 512, {2}, 4), low_up(320, 512, {2}, 4);
  const Matrix low_down(512, 320, {2, 1}, 4, kOne, Grid::mxfp4);
  const std::vector<float> bias = random_floats(512);
  const std::vector<ExpertRows> parts = {
      {{gate.view, up.view, down.view}, 0, 3},
      {{low.view, low_up.view, low_down.view, bias.data(), bias.data() + 5, bias.data()}, 3, 150}};
  const std::vector<float> x = random_floats(150 * 512);
  std::vector<int64_t> tokens(153);
  for (int64_t i = 0; i < 153; ++i) tokens[i] = i < 3 ? 7 * i : i - 3;
  std::vector<float> y[2];
  for (int count : {1, 3}) {
    set_threads(count);
    std::vector<float>& out = y[count / 2];
    out.resize(153 * 512);
    moe(isa, parts, x.data(), tokens.data(), {ActivationKind::silu}, out.data());
  }
  set_threads(1);
  expect(y[0] == y[1], isa.name, "threads");
}

void check_isa(const Kernels& isa) {
  check_products(isa);
  check_quantize(isa);
  check_vectors(isa);
  check_halves(isa);
  check_rows(isa);
  check_attention(isa);
  check_extreme_attention(isa);
  check_delta(isa);
  check_routes(isa);
  for (unsigned seed = 0; seed < 5; ++seed)
    expect(quantized_by(isa, seed) == quantized_by(kScalar, seed), isa.name, "fit and descent");
  check_threads(isa);
  check_stack(isa);
  check_token(isa);
}

/// What does not depend on the instruction set.
void check_rest() {
  check_rotate("rest");
  check_table();
  check_waits();
  check_reads();
}

/// Prints whether all is as it should be.
template <class Check>
void report(const char* whose, Check check) {
  const int before = failures;
  check();
  std::printf("%s: %s\n", whose, failures == before ? "right" : "WRONG");
}

}  // namespace
}  // namespace dymoe

/// Checks the instruction sets that are named, or `rest`; without names, all of them.
int main(int count, char** names) {
  using namespace dymoe;
  const std::set<std::string> wanted(names + 1, names + count);
  const auto is_wanted = [&](const std::string& name) { return wanted.empty() || wanted.count(name); };
  for (const Kernels* isa : available_isas())
    if (is_wanted(isa->name)) report(isa->name, [&] { check_isa(*isa); });
  if (is_wanted("rest")) report("rest", check_rest);
  return failures > 0;
}

// The gated delta rule of one head, and the convolution before it.
//
// Everything is in an unnamed namespace; product.h says why.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "templates/activate.h"
#include "templates/lanes.h"
#include "templates/sources.h"
#include "templates/vectors.h"

namespace dymoe {
namespace {

// Convolving as many tokens takes about as long as memory to answer. Their inputs are so far apart that processors do
// not foresee the next ones.
constexpr int64_t kAheadTokens = 8;

/// Computes `count` channels of a convolution from channel `at` on, to columns of c.out from `column` on. Taps is
/// c.taps, or 0 if that is not known when this is compiled.
template <int Taps>
void convolve_block(const Convolution& c, int64_t at, int64_t count, int64_t column) {
  const int64_t taps = Taps ? Taps : c.taps;
  float weights[kMaxTaps][kBlock];
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < taps; ++j) weights[j][i] = c.conv[(at + i) * taps + j];
  for (int64_t t = 0; t < c.tokens; ++t) {
    const float* inputs[kMaxTaps];
    for (int64_t j = 0; j < taps; ++j) {
      const int64_t row = c.first + t + j;  // of tail, then of mixed
      inputs[j] = (row < taps - 1 ? c.tail + row * c.channels : c.mixed + (row - taps + 1) * c.channels) + at;
    }
    prefetch_bytes<kBlock * int64_t(sizeof(float))>(
        reinterpret_cast<const uint8_t*>(inputs[taps - 1] + kAheadTokens * c.channels));
    float sums[kBlock];
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      Floats sum{};
      for (int64_t j = 0; j < taps; ++j) sum += load_lanes(inputs[j] + i) * load_lanes(weights[j] + i);
      store_lanes(sums + i, sum);
    }
    for (; i < count; ++i) {
      sums[i] = 0.0f;
      for (int64_t j = 0; j < taps; ++j) sums[i] += inputs[j][i] * weights[j][i];
    }
    float* out = c.out + t * c.pitch + column;
    for (i = 0; i < count; ++i) out[i] = silu(sums[i]);
  }
}

/// See Kernels::convolve.
void convolve(const Convolution& c, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    if (c.taps == 4) {  // as in all models so far
      convolve_block<4>(c, at, count, at - begin);
    } else {
      convolve_block<0>(c, at, count, at - begin);
    }
  }
}

/// Returns a * b + c.
inline float multiply_add(float a, float b, float c) { return a * b + c; }

/// `Count` vectors of columns of a head's memory; its rows are `pitch` floats apart.
template <class Vector, int Count>
struct DeltaColumns {
  static constexpr int64_t kWidth = int64_t(sizeof(Vector) / sizeof(float));  // of a vector

  const DeltaHead& head;
  float* memory;  // of the first row
  int64_t pitch;
  Vector recalled[Count];  // key . memory for the next token

  static Vector load(const float* p, int c) {
    Vector v;
    std::memcpy(&v, p + c * kWidth, sizeof v);
    return v;
  }
  static void store(float* p, int c, Vector v) { std::memcpy(p + c * kWidth, &v, sizeof v); }

  /// Runs all tokens for the columns from `column` on.
  void run(int64_t column) {
    for (int c = 0; c < Count; ++c) recalled[c] = Vector{};
    for (int64_t i = 0; i < head.key_dim; ++i) {
      const Vector key = head.keys[i] - Vector{};
#pragma GCC unroll 8
      for (int c = 0; c < Count; ++c) recalled[c] = multiply_add(key, load(memory + i * pitch, c), recalled[c]);
    }
    for (int64_t t = 0; t + 1 < head.tokens; ++t) run_token<true>(t, column);
    run_token<false>(head.tokens - 1, column);
  }

  /// Runs token t. One pass over the memory updates it, reads y out of it, and if there are `More` tokens, recalls what
  /// it has for the next key.
  template <bool More>
  void run_token(int64_t t, int64_t column) {
    const float *key = head.keys + t * head.pitch, *query = head.queries + t * head.pitch;
    const float* next = key + (More ? head.pitch : 0);
    const float* value = head.values + t * head.pitch + column;
    const Vector fade = head.fades[t] - Vector{}, share = head.shares[t] - Vector{};
    Vector change[Count], y[Count], later[Count];
#pragma GCC unroll 8
    for (int c = 0; c < Count; ++c) {
      change[c] = share * (load(value, c) - fade * recalled[c]);
      y[c] = later[c] = Vector{};
    }
    const int64_t rows = head.key_dim, step = pitch;  // the stores below could change what a pointer leads to
    float* at = memory;
    for (int64_t i = 0; i < rows; ++i, at += step) {
      const Vector k = key[i] - Vector{}, q = query[i] - Vector{}, n = next[i] - Vector{};
#pragma GCC unroll 8
      for (int c = 0; c < Count; ++c) {
        const Vector kept = multiply_add(k, change[c], fade * load(at, c));
        store(at, c, kept);
        y[c] = multiply_add(q, kept, y[c]);
        if (More) later[c] = multiply_add(n, kept, later[c]);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < Count; ++c) {
      store(head.y + t * head.y_pitch + column, c, y[c]);
      recalled[c] = later[c];
    }
  }
};

/// Runs columns [begin, end) of a head, whose memory is at `memory` from column `begin` on, with rows `pitch` apart:
/// `Together` vectors at a time, then single ones.
template <int Together>
void run_columns(const DeltaHead& head, int64_t begin, int64_t end, float* memory, int64_t pitch) {
  int64_t at = begin;
  for (; at + Together * kLanes <= end; at += Together * kLanes)
    DeltaColumns<Floats, Together>{head, memory + at - begin, pitch, {}}.run(at);
  for (; at + kLanes <= end; at += kLanes) DeltaColumns<Floats, 1>{head, memory + at - begin, pitch, {}}.run(at);
  for (; at < end; ++at) DeltaColumns<float, 1>{head, memory + at - begin, pitch, {}}.run(at);
}

/// See Kernels::delta. The columns of many tokens are copied, so that they are close together and stay in the L1 cache;
/// rows that are a power of two apart would not. One token takes whole rows as they come.
void delta(const DeltaHead& head, float* scratch) {
  if (head.tokens == 1) return run_columns<8>(head, 0, head.value_dim, head.memory, head.value_dim);
  constexpr int kTogether = kDeltaColumns / kLanes < 4 ? kDeltaColumns / kLanes : 4;
  for (int64_t at = 0; at < head.value_dim; at += kDeltaColumns) {
    const int64_t width = head.value_dim - at < kDeltaColumns ? head.value_dim - at : kDeltaColumns;
    float* memory = head.memory + at;
    for (int64_t i = 0; i < head.key_dim; ++i)
      std::memcpy(scratch + i * kDeltaColumns, memory + i * head.value_dim, width * sizeof(float));
    run_columns<kTogether>(head, at, at + width, scratch, kDeltaColumns);
    for (int64_t i = 0; i < head.key_dim; ++i)
      std::memcpy(memory + i * head.value_dim, scratch + i * kDeltaColumns, width * sizeof(float));
  }
}

}  // namespace
}  // namespace dymoe

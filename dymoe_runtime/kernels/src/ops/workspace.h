// Helpers of whole operations: memory that stays between calls, parallel ranges, and quantized tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

#include "kernels.h"
#include "threads/pool.h"

namespace dymoe {

constexpr int64_t kTokens = 256;         // most tokens of one pass, so that their activations stay in the L2 cache
constexpr int64_t kRowMultiple = 16;     // floats of a cache line, so that threads do not share one
constexpr int64_t kChunksPerThread = 4;  // so that threads of unequal speed finish together
constexpr int64_t kSmallWork = 4096;     // work that costs about as much as waking the threads, in products of 64 codes
constexpr int64_t kFloatWork = 8;        // cost of a product of 64 floats, in products of 64 codes

/// Returns `value` rounded up to a multiple of `unit`.
inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/// Memory that only grows and is kept, aligned to cache lines. Growing discards its content.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  /// Returns memory for `count` elements, valid until the next call.
  T* reserve(int64_t count) {
    if (count > size_) {
      release();
      data_ = static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)));
      size_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;

  void release() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
    data_ = nullptr, size_ = 0;
  }
};

/// Returns the calling thread's scratch memory for `product` and `dequantize`.
inline uint8_t* scratch_for(const MatrixView& m) {
  thread_local Buffer<uint8_t> buffer;
  return buffer.reserve(scratch_bytes(m.blocks));
}

/// Calls body(begin, end) for ranges that cover [0, count) and begin at multiples of `multiple`. They run in parallel
/// if `work`, in products of 64 codes, is at least kSmallWork.
template <class Range>
void parallel_ranges(int64_t count, int64_t multiple, int64_t work, Range body) {
  if (work < kSmallWork || threads() == 1) return body(0, count);
  const int64_t share = count / (threads() * kChunksPerThread);
  const int64_t chunk = round_up(std::max<int64_t>(share, 1), multiple);
  parallel_for((count + chunk - 1) / chunk, [&](int64_t i) { body(i * chunk, std::min(count, (i + 1) * chunk)); });
}

/// Buffers for the quantized activations of one call.
class QuantizedTokens {
 public:
  /// Quantizes tokens; token t is the floats [cols] at row(t). The result is valid until the next call.
  template <class Row>
  Activations quantize(const Kernels& isa, int64_t tokens, int64_t cols, Row row) {
    const int64_t blocks = (cols + kBlock - 1) / kBlock, pitch = round_up(blocks, kGroup);
    const bool folds = isa.folds_from && tokens >= isa.folds_from;
    const bool transposes = isa.transposes_from && tokens >= isa.transposes_from;
    const int64_t beside = transposes ? round_up(tokens + kBeside, kRowMultiple) : 0;
    const Activations a{tokens,
                        blocks,
                        pitch,
                        codes_.reserve(tokens * codes_pitch(blocks)),
                        scales_.reserve(kCopies * tokens * pitch),
                        sums_.reserve(tokens * pitch),
                        half_sums_.reserve(2 * tokens * pitch),
                        isa.folds_from ? folded_scales_.reserve(tokens * pitch) : nullptr,
                        isa.folds_from ? folded_sums_.reserve(tokens * pitch) : nullptr,
                        folds ? folded_codes_.reserve(tokens * codes_pitch(blocks)) : nullptr,
                        beside,
                        transposes ? transposed_codes_.reserve(beside * blocks * kBlock) : nullptr,
                        transposes ? transposed_scales_.reserve(beside * blocks) : nullptr,
                        transposes ? transposed_sums_.reserve(beside * blocks) : nullptr};
    for (int64_t at = 0; at < beside * blocks; at += beside) {
      std::fill(a.transposed_scales + at + tokens, a.transposed_scales + at + beside, 0.0f);
      std::fill(a.transposed_sums + at + tokens, a.transposed_sums + at + beside, 0.0f);
    }
    parallel_ranges(tokens, 1, tokens * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) isa.quantize(row(t), cols, t, a);
    });
    return a;
  }

 private:
  Buffer<int8_t> codes_, folded_codes_, transposed_codes_;
  Buffer<float> scales_, sums_, half_sums_, folded_scales_, folded_sums_, transposed_scales_, transposed_sums_;
};

/// Returns tokens [first, first + count) of `a`.
inline Activations some_tokens(const Activations& a, int64_t first, int64_t count) {
  return {count,
          a.blocks,
          a.pitch,
          a.codes + first * codes_pitch(a.blocks),
          a.scales + kCopies * first * a.pitch,
          a.sums + first * a.pitch,
          a.half_sums + 2 * first * a.pitch,
          a.folded_scales ? a.folded_scales + first * a.pitch : nullptr,
          a.folded_sums ? a.folded_sums + first * a.pitch : nullptr,
          a.folded_codes ? a.folded_codes + first * codes_pitch(a.blocks) : nullptr,
          a.transposed_pitch,
          a.transposed_codes ? a.transposed_codes + 4 * first : nullptr,
          a.transposed_codes ? a.transposed_scales + first : nullptr,
          a.transposed_codes ? a.transposed_sums + first : nullptr};
}

}  // namespace dymoe

#include "ops.h"

#include <algorithm>
#include <new>

#include "pool.h"

namespace dymoe {
namespace {

constexpr int64_t kTokens = 128;         // tokens of one pass: their activations stay in the L2 cache
constexpr int64_t kRowMultiple = 16;     // floats of a cache line, so that threads do not share one
constexpr int64_t kChunksPerThread = 4;  // lets threads of unequal speed finish together
constexpr int64_t kSmallWork = 4096;     // products of 64 codes that cost about as much as a wake-up

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/// Memory that grows and stays, aligned to cache lines; what it held is lost when it grows.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

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

/// What one calling thread keeps between calls.
struct Workspace {
  Buffer<int8_t> codes;
  Buffer<float> scales, sums;
  Buffer<float> hidden, up;  // [tokens, intermediate]
};

thread_local Workspace workspace;
thread_local Buffer<uint8_t> scratch_buffer;

uint8_t* scratch_for(const MatrixView& m) { return scratch_buffer.reserve(kScratchRows * m.blocks * kBlock); }

/// Calls body(begin, end) for ranges that cover [0, count), in parallel if `work` is worth it.
template <class Range>
void parallel_ranges(int64_t count, int64_t multiple, int64_t work, Range body) {
  if (work < kSmallWork || threads() == 1) return body(0, count);
  const int64_t share = count / (threads() * kChunksPerThread);
  const int64_t chunk = round_up(std::max<int64_t>(share, 1), multiple);
  parallel_for((count + chunk - 1) / chunk,
               [&](int64_t i) { body(i * chunk, std::min(count, (i + 1) * chunk)); });
}

Activations quantize(const Kernels& isa, const float* x, int64_t tokens, int64_t cols) {
  const int64_t blocks = (cols + kBlock - 1) / kBlock, pitch = round_up(blocks, kGroup);
  const Activations a{tokens,
                      blocks,
                      pitch,
                      workspace.codes.reserve(tokens * blocks * kBlock),
                      workspace.scales.reserve(tokens * pitch),
                      workspace.sums.reserve(tokens * pitch)};
  parallel_ranges(tokens, 1, tokens * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) isa.quantize(x + t * cols, cols, t, a);
  });
  return a;
}

void multiply(const Kernels& isa, const MatrixView& m, const Activations& a, float* y) {
  parallel_ranges(m.rows, kRowMultiple, m.rows * m.blocks * a.tokens, [&](int64_t begin, int64_t end) {
    isa.product(m, a, begin, end, y, m.rows, scratch_for(m));
  });
}

/// hidden = act(x . gate^T) * (x . up^T), [tokens, intermediate].
void gate_and_up(const Kernels& isa, const MatrixView& gate, const MatrixView& up, const Activations& a,
                 Activation activation, float* hidden, float* ups) {
  parallel_ranges(gate.rows, kRowMultiple, 2 * gate.rows * gate.blocks * a.tokens, [&](int64_t begin, int64_t end) {
    isa.product(gate, a, begin, end, hidden, gate.rows, scratch_for(gate));
    isa.product(up, a, begin, end, ups, up.rows, scratch_for(up));
    for (int64_t at = begin; at < a.tokens * gate.rows; at += gate.rows)
      isa.activate(activation, end - begin, ups + at, hidden + at);
  });
}

}  // namespace

void linear(const Kernels& isa, const MatrixView& weight, const float* x, int64_t tokens, float* y) {
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const int64_t count = std::min(kTokens, tokens - t);
    multiply(isa, weight, quantize(isa, x + t * weight.cols, count, weight.cols), y + t * weight.rows);
  }
}

void ffn(const Kernels& isa, const MatrixView& gate, const MatrixView& up, const MatrixView& down, const float* x,
         int64_t tokens, Activation activation, float* y) {
  const int64_t pass = std::min(kTokens, tokens);
  float* hidden = workspace.hidden.reserve(pass * gate.rows);
  float* ups = workspace.up.reserve(pass * gate.rows);
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const int64_t count = std::min(kTokens, tokens - t);
    gate_and_up(isa, gate, up, quantize(isa, x + t * gate.cols, count, gate.cols), activation, hidden, ups);
    multiply(isa, down, quantize(isa, hidden, count, down.cols), y + t * down.rows);
  }
}

void descend(const Kernels& isa, const Descent& block) {
  constexpr int64_t kRows = 16;
  parallel_ranges(block.rows, kRows, block.rows * kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kRows) isa.descend(block, row, std::min(kRows, end - row));
  });
}

void fit(const Kernels& isa, const Fit& fit) {
  constexpr int64_t kRows = 16;
  parallel_ranges(fit.rows, kRows, fit.rows * fit.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kRows) isa.fit(fit, row, std::min(kRows, end - row));
  });
}

void rows(const Kernels& isa, const MatrixView& weight, const int64_t* ids, int64_t count, float* out) {
  parallel_ranges(count, 1, count * weight.blocks, [&](int64_t begin, int64_t end) {
    uint8_t* scratch = scratch_for(weight);
    for (int64_t i = begin; i < end; ++i) isa.dequantize(weight, ids ? ids[i] : i, out + i * weight.cols, scratch);
  });
}

}  // namespace dymoe

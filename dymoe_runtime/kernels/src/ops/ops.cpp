#include "ops/ops.h"
#include "trellis_tables.h"

#include <atomic>
#include <cstring>

#include "ops/workspace.h"

namespace dymoe {
namespace {

thread_local QuantizedTokens quantized;

/// Converts bf16 to floats and returns `out`.
const float* widen(const uint16_t* bits, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t word = uint32_t(bits[i]) << 16;
    std::memcpy(out + i, &word, sizeof word);
  }
  return out;
}

}  // namespace

void linear(const Kernels& isa, const MatrixView& weight, const float* x, int64_t tokens, float* y) {
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const int64_t count = std::min(kTokens, tokens - t);
    const Activations a =
        quantized.quantize(isa, count, weight.cols, [&](int64_t i) { return x + (t + i) * weight.cols; });
    parallel_ranges(weight.rows, kRowMultiple, weight.rows * weight.blocks * count, [&](int64_t begin, int64_t end) {
      isa.product(weight, a, begin, end, y + t * weight.rows, weight.rows, scratch_for(weight));
    });
  }
}

void matmul(const Kernels& isa, const void* weight, bool is_bf16, int64_t rows, int64_t cols, const float* x,
            int64_t tokens, float* y) {
  parallel_ranges(rows, kRowMultiple, rows * cols / kBlock * tokens * kFloatWork, [&](int64_t begin, int64_t end) {
    thread_local Buffer<float> wide;
    for (int64_t r = begin; r < end; r += kRowMultiple) {  // as many rows for each pass over x
      const int64_t count = std::min(kRowMultiple, end - r);
      const float* some = is_bf16 ? widen(static_cast<const uint16_t*>(weight) + r * cols, count * cols,
                                          wide.reserve(kRowMultiple * cols))
                                  : static_cast<const float*>(weight) + r * cols;
      for (int64_t t = 0; t < tokens; ++t) isa.dots(some, cols, 0, count, x + t * cols, y + t * rows + r);
    }
  });
}

void activate(const Kernels& isa, Activation activation, int64_t count, const float* ups, float* hidden) {
  parallel_ranges(count, kBlock, count / kBlock * kFloatWork, [&](int64_t begin, int64_t end) {
    isa.activate(activation, end - begin, ups + begin, hidden + begin);
  });
}

void norms(const Kernels& isa, const float* x, const float* weight, int64_t tokens, int64_t n, float eps, float* out) {
  parallel_ranges(tokens, 1, tokens * n / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) isa.norm(x + t * n, weight, n, eps, out + t * n);
  });
}

void layer_norms(const Kernels& isa, const float* x, const float* weight, const float* bias, int64_t tokens, int64_t n,
                 float eps, float* out) {
  parallel_ranges(tokens, 1, tokens * n / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) isa.layer_norm(x + t * n, weight, bias, n, eps, out + t * n);
  });
}

void rotate(float* x, int64_t tokens, int64_t heads, int64_t n, int64_t turning, const float* cosines,
            const float* sines) {
  const int64_t half = turning / 2;
  parallel_ranges(tokens, 1, tokens * heads * turning / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float *c = cosines + t * turning, *s = sines + t * turning;
      for (float *head = x + t * heads * n, *stop = head + heads * n; head < stop; head += n) {
        for (int64_t i = 0; i < half; ++i) {
          const float a = head[i], b = head[i + half];
          head[i] = a * c[i] - b * s[i];
          head[i + half] = b * c[i + half] + a * s[i + half];
        }
      }
    }
  });
}

uint64_t read_memory(const uint8_t* data, int64_t nbytes) {
  constexpr int64_t kPiece = 1 << 18;
  constexpr int kWords = 16;  // independent sums, so that additions do not wait for one another
  std::atomic<uint64_t> total{0};
  parallel_for((nbytes + kPiece - 1) / kPiece, [&](int64_t piece) {
    const int64_t end = std::min(nbytes, (piece + 1) * kPiece);
    uint64_t sums[kWords] = {}, words[kWords];
    for (int64_t i = piece * kPiece; i + int64_t(sizeof words) <= end; i += sizeof words) {
      std::memcpy(words, data + i, sizeof words);
      for (int w = 0; w < kWords; ++w) sums[w] += words[w];
    }
    for (uint64_t sum : sums) total += sum;
  });
  return total;
}

void descend(const Kernels& isa, const Descent& block) {
  constexpr int64_t kRows = 16;
  const int64_t count = block.trellis ? kTrellisRows : kRows;
  parallel_ranges(block.rows, count, block.rows * kBlock, [&](int64_t begin, int64_t end) {
    thread_local Buffer<uint8_t> buffer;
    uint8_t* scratch = block.trellis ? buffer.reserve(isa.descent_bytes) : nullptr;
    for (int64_t row = begin; row < end; row += count) isa.descend(block, row, std::min(count, end - row), scratch);
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

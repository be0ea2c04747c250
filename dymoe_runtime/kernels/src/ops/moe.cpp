#include "ops/moe.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "ops/workspace.h"

namespace dymoe {
namespace {

/// Memory of a thread that stays between calls.
struct Workspace {
  QuantizedTokens quantized;
  Buffer<float> hidden, ups;  // [rows of a pass, intermediate]
};

thread_local Workspace workspace;

/// A unit of work: rows [begin, end) of a matrix of a part's expert, times the tokens of the part.
struct Item {
  const ExpertRows* part;
  int64_t begin, end;
};

/// Splits the matrix of every part by rows into items of about equal work.
std::vector<Item> split_rows(const std::vector<ExpertRows>& parts, const MatrixView Expert::* matrix) {
  const int64_t rows = (parts[0].expert.*matrix).rows;
  int64_t tokens = 0;
  for (const ExpertRows& part : parts) tokens += part.count;
  const int64_t wanted = threads() == 1 ? 1 : threads() * kChunksPerThread;
  const int64_t share = std::max<int64_t>(1, rows * tokens / wanted);  // rows times tokens
  std::vector<Item> items;
  for (const ExpertRows& part : parts) {
    const int64_t chunk = std::min(rows, round_up(std::max<int64_t>(share / part.count, 1), kRowMultiple));
    for (int64_t begin = 0; begin < rows; begin += chunk)
      items.push_back({&part, begin, std::min(rows, begin + chunk)});
  }
  return items;
}

/// Calls body(item) for each item, in parallel if `work` is worth it; see kSmallWork.
template <class Body>
void run(const std::vector<Item>& items, int64_t work, Body body) {
  if (work < kSmallWork) {
    for (const Item& item : items) body(item);
  } else {
    parallel_for(int64_t(items.size()), [&](int64_t i) { body(items[i]); });
  }
}

/// Adds the item's rows of `bias`, unless it is null, to the outputs y [tokens, width] of the item's part.
void add_bias(const float* bias, const Item& item, int64_t width, float* y) {
  if (!bias) return;
  for (float* stop = y + item.part->count * width; y < stop; y += width)
    for (int64_t r = item.begin; r < item.end; ++r) y[r] += bias[r];
}

/// Runs parts that together are the rows [first, first + count), at most kTokens.
void pass(const Kernels& isa, const std::vector<ExpertRows>& parts, int64_t first, int64_t count, const float* x,
          const int64_t* tokens, Activation activation, float* y) {
  const MatrixView &gate = parts[0].expert.gate, &down = parts[0].expert.down;
  const auto token = [&](int64_t row) { return tokens ? tokens[first + row] : first + row; };
  // While decoding, all parts have the same token, which is quantized once.
  bool one = true;
  for (const ExpertRows& part : parts) one = one && part.count == 1 && token(part.first - first) == token(0);
  const auto rows_of = [&](const Activations& a, const ExpertRows& part) {
    return one && a.tokens == 1 ? a : some_tokens(a, part.first - first, part.count);
  };
  float* hidden = workspace.hidden.reserve(count * gate.rows);
  float* ups = workspace.ups.reserve(count * gate.rows);
  const Activations in = workspace.quantized.quantize(isa, one ? 1 : count, gate.cols,
                                                      [&](int64_t row) { return x + token(row) * gate.cols; });
  run(split_rows(parts, &Expert::gate), 2 * gate.rows * gate.blocks * count, [&](const Item& item) {
    const ExpertRows& part = *item.part;
    const int64_t at = (part.first - first) * gate.rows;
    isa.product(part.expert.gate, rows_of(in, part), item.begin, item.end, hidden + at, gate.rows, scratch_for(gate));
    isa.product(part.expert.up, rows_of(in, part), item.begin, item.end, ups + at, gate.rows, scratch_for(gate));
    add_bias(part.expert.gate_bias, item, gate.rows, hidden + at);
    add_bias(part.expert.up_bias, item, gate.rows, ups + at);
    for (int64_t t = 0; t < part.count; ++t) {
      const int64_t from = at + t * gate.rows + item.begin;
      isa.activate(activation, item.end - item.begin, ups + from, hidden + from);
    }
  });
  const Activations middle =
      workspace.quantized.quantize(isa, count, down.cols, [&](int64_t row) { return hidden + row * down.cols; });
  run(split_rows(parts, &Expert::down), down.rows * down.blocks * count, [&](const Item& item) {
    const ExpertRows& part = *item.part;
    float* out = y + part.first * down.rows;
    isa.product(part.expert.down, some_tokens(middle, part.first - first, part.count), item.begin, item.end, out,
                down.rows, scratch_for(down));
    add_bias(part.expert.down_bias, item, down.rows, out);
  });
}

}  // namespace

void check(const std::vector<ExpertRows>& parts, const int64_t* tokens, int64_t rows, int64_t count) {
  const auto reject = [](const std::string& message) { throw std::invalid_argument(message); };
  for (const ExpertRows& part : parts) {
    const MatrixView &gate = part.expert.gate, &first = parts[0].expert.gate;
    if (gate.rows != first.rows || gate.cols != first.cols) reject("experts: their shapes differ");
    if (part.first < 0 || part.count < 0 || part.count > rows || part.first > rows - part.count)
      reject("rows " + std::to_string(part.first) + ".." + std::to_string(part.first + part.count) + " are not in 0.." +
             std::to_string(rows));
    for (int64_t i = part.first; i < part.first + part.count; ++i)
      if (tokens[i] < 0 || tokens[i] >= count)
        reject("tokens: " + std::to_string(tokens[i]) + " is not below " + std::to_string(count));
  }
}

void moe(const Kernels& isa, const std::vector<ExpertRows>& parts, const float* x, const int64_t* tokens,
         Activation activation, float* y) {
  std::vector<ExpertRows> some;
  int64_t count = 0;
  const auto flush = [&] {
    if (count) pass(isa, some, some[0].first, count, x, tokens, activation, y);
    some.clear(), count = 0;
  };
  for (const ExpertRows& part : parts) {
    for (int64_t done = 0; done < part.count;) {
      // The rows of a pass are consecutive.
      if (count == kTokens || (count && part.first + done != some.back().first + some.back().count)) flush();
      ExpertRows piece = part;
      piece.first = part.first + done;
      piece.count = std::min(part.count - done, kTokens - count);
      some.push_back(piece);
      count += piece.count, done += piece.count;
    }
  }
  flush();
}

TokenMoe::TokenMoe(const Kernels& isa, const std::vector<const Expert*>& experts, const float* x, Activation activation)
    : isa_(isa),
      experts_(experts),
      x_(x),
      activation_(activation),
      tokens_(experts.size(), 0),
      rows_(experts.size(), -1) {
  thread_local Buffer<float> outputs;
  y_ = outputs.reserve(int64_t(experts.size()) * experts[0]->gate.cols);
}

void TokenMoe::run(const std::vector<int64_t>& ranks) {
  std::vector<ExpertRows> parts;
  for (int64_t rank : ranks) {
    rows_[rank] = count_++;
    parts.push_back({*experts_[rank], rows_[rank], 1});
  }
  moe(isa_, parts, x_, tokens_.data(), activation_, y_);
}

void TokenMoe::combine(const float* weights, float* out) const {
  dymoe::combine(y_, rows_.data(), weights, 1, int64_t(rows_.size()), experts_[0]->gate.cols, out);
}

void combine(const float* y, const int64_t* rows, const float* weights, int64_t tokens, int64_t ranks, int64_t width,
             float* out) {
  parallel_ranges(tokens, 1, tokens * ranks * width / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* to = out + t * width;
      std::memset(to, 0, width * sizeof(float));
      for (int64_t j = t * ranks; j < (t + 1) * ranks; ++j) {
        if (rows[j] < 0) continue;
        const float weight = weights[j];
        const float* from = y + rows[j] * width;
        for (int64_t i = 0; i < width; ++i) to[i] += weight * from[i];
      }
    }
  });
}

}  // namespace dymoe

#include "moe.h"

#include <cstring>

#include "workspace.h"

namespace dymoe {
namespace {

struct Workspace {
  QuantizedTokens quantized;
  Buffer<float> hidden, ups;  // [rows of a pass, intermediate]
};

thread_local Workspace workspace;

/// Rows [begin, end) of a matrix times the tokens of a job.
struct Item {
  const Job* job;
  int64_t begin, end;
};

/// Cuts the matrix of every job by rows into items of about equal work.
std::vector<Item> cut(const std::vector<Job>& jobs, const MatrixView Expert::*matrix) {
  const int64_t rows = (jobs[0].expert.*matrix).rows;
  int64_t tokens = 0;
  for (const Job& job : jobs) tokens += job.count;
  const int64_t items = threads() == 1 ? 1 : threads() * kChunksPerThread;
  const int64_t share = std::max<int64_t>(1, rows * tokens / items);  // rows times tokens
  std::vector<Item> cut;
  for (const Job& job : jobs) {
    const int64_t chunk = std::min(rows, round_up(std::max<int64_t>(share / job.count, 1), kRowMultiple));
    for (int64_t begin = 0; begin < rows; begin += chunk) cut.push_back({&job, begin, std::min(rows, begin + chunk)});
  }
  return cut;
}

template <class Body>
void run(const std::vector<Item>& items, int64_t work, Body body) {
  if (work < kSmallWork) {
    for (const Item& item : items) body(item);
  } else {
    parallel_for(int64_t(items.size()), [&](int64_t i) { body(items[i]); });
  }
}

/// One pass over jobs of at most kTokens rows together, which are the rows from `first` on.
void pass(const Kernels& isa, const std::vector<Job>& jobs, int64_t first, int64_t count, const float* x,
          const int64_t* tokens, Activation activation, float* y) {
  const MatrixView &gate = jobs[0].expert.gate, &down = jobs[0].expert.down;
  const auto token = [&](int64_t row) { return tokens ? tokens[first + row] : first + row; };
  // While decoding, all jobs have the same token.
  bool one = true;
  for (const Job& job : jobs) one = one && job.count == 1 && token(job.first - first) == token(0);
  const auto of = [&](const Activations& a, const Job& job) {
    return one && a.tokens == 1 ? a : some_tokens(a, job.first - first, job.count);
  };
  float* hidden = workspace.hidden.reserve(count * gate.rows);
  float* ups = workspace.ups.reserve(count * gate.rows);
  const Activations in =
      workspace.quantized.quantize(isa, one ? 1 : count, gate.cols, [&](int64_t row) { return x + token(row) * gate.cols; });
  run(cut(jobs, &Expert::gate), 2 * gate.rows * gate.blocks * count, [&](const Item& item) {
    const Job& job = *item.job;
    const int64_t at = (job.first - first) * gate.rows;
    isa.product(job.expert.gate, of(in, job), item.begin, item.end, hidden + at, gate.rows, scratch_for(gate));
    isa.product(job.expert.up, of(in, job), item.begin, item.end, ups + at, gate.rows, scratch_for(gate));
    for (int64_t t = 0; t < job.count; ++t) {
      const int64_t from = at + t * gate.rows + item.begin;
      isa.activate(activation, item.end - item.begin, ups + from, hidden + from);
    }
  });
  const Activations middle =
      workspace.quantized.quantize(isa, count, down.cols, [&](int64_t row) { return hidden + row * down.cols; });
  run(cut(jobs, &Expert::down), down.rows * down.blocks * count, [&](const Item& item) {
    const Job& job = *item.job;
    isa.product(job.expert.down, some_tokens(middle, job.first - first, job.count), item.begin, item.end,
                y + job.first * down.rows, down.rows, scratch_for(down));
  });
}

}  // namespace

void moe(const Kernels& isa, const std::vector<Job>& jobs, const float* x, const int64_t* tokens,
         Activation activation, float* y) {
  std::vector<Job> some;
  int64_t count = 0;
  const auto flush = [&] {
    if (count) pass(isa, some, some[0].first, count, x, tokens, activation, y);
    some.clear(), count = 0;
  };
  for (const Job& job : jobs) {
    for (int64_t done = 0; done < job.count;) {
      // The rows of a pass follow each other.
      if (count == kTokens || (count && job.first + done != some.back().first + some.back().count)) flush();
      Job part = job;
      part.first = job.first + done;
      part.count = std::min(job.count - done, kTokens - count);
      some.push_back(part);
      count += part.count, done += part.count;
    }
  }
  flush();
}

TokenMoe::TokenMoe(const Kernels& isa, const std::vector<const Expert*>& experts, const float* x,
                   Activation activation)
    : isa_(isa), experts_(experts), x_(x), activation_(activation), tokens_(experts.size(), 0),
      rows_(experts.size(), -1) {
  thread_local Buffer<float> each;
  y_ = each.reserve(int64_t(experts.size()) * experts[0]->gate.cols);
}

void TokenMoe::run(const std::vector<int64_t>& ranks) {
  std::vector<Job> jobs;
  for (int64_t rank : ranks) {
    rows_[rank] = count_++;
    jobs.push_back({*experts_[rank], rows_[rank], 1});
  }
  moe(isa_, jobs, x_, tokens_.data(), activation_, y_);
}

void TokenMoe::combine(const float* gates, float* out) const {
  dymoe::combine(y_, rows_.data(), gates, 1, int64_t(rows_.size()), experts_[0]->gate.cols, out);
}

void combine(const float* y, const int64_t* rows, const float* gates, int64_t tokens, int64_t ranks, int64_t width,
             float* out) {
  parallel_ranges(tokens, 1, tokens * ranks * width / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* to = out + t * width;
      std::memset(to, 0, width * sizeof(float));
      for (int64_t j = t * ranks; j < (t + 1) * ranks; ++j) {
        if (rows[j] < 0) continue;
        const float gate = gates[j];
        const float* from = y + rows[j] * width;
        for (int64_t i = 0; i < width; ++i) to[i] += gate * from[i];
      }
    }
  });
}

}  // namespace dymoe

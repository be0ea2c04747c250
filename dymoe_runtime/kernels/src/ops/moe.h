// The routed experts of a layer, for many tokens or for one.
#pragma once

#include <vector>

#include "record/expert.h"

namespace dymoe {

/// An expert and the rows [first, first + count) of a call that go through it.
struct ExpertRows {
  Expert expert;
  int64_t first, count;
};

/// Computes y[i] = (act(x[t] . gate^T) * (x[t] . up^T)) . down^T for the rows i of each part. t is tokens[i], or i if
/// `tokens` is null. The biases of an expert are added after each product. x is [.., hidden], y [rows, hidden]. All
/// experts must have the same shapes. The value of a row does not depend on the other rows of the call.
void moe(const Kernels& isa, const std::vector<ExpertRows>& parts, const float* x, const int64_t* tokens,
         Activation activation, float* y);

/// Throws std::invalid_argument unless all experts have the same shapes, all rows lie in [0, rows), and their tokens in
/// [0, count).
void check(const std::vector<ExpertRows>& parts, const int64_t* tokens, int64_t rows, int64_t count);

/// Runs one token through its experts, which may come in any order and a few at a time. The outputs lie in a buffer of
/// the thread, so a thread may have only one TokenMoe at a time.
class TokenMoe {
 public:
  /// x is [hidden]. `experts` and `x` must outlive this object.
  TokenMoe(const Kernels& isa, const std::vector<const Expert*>& experts, const float* x, Activation activation);

  /// Runs the experts with these indices; each expert runs once.
  void run(const std::vector<int64_t>& ranks);

  /// Computes out = sum over j of weights[j] * output of expert j, [hidden], for the experts that have run.
  void combine(const float* weights, float* out) const;

 private:
  const Kernels& isa_;
  const std::vector<const Expert*>& experts_;
  const float* x_;
  const Activation activation_;
  const std::vector<int64_t> tokens_;  // index of the token of each row: 0
  std::vector<int64_t> rows_;          // row of y_ of each expert; -1 before it runs
  int64_t count_ = 0;                  // rows that have run
  float* y_;                           // [experts, hidden], in the order in which experts ran
};

/// Computes out[t] = sum over j of weights[t, j] * y[rows[t, j]], added in the order of j; negative rows are left out.
/// weights and rows are [tokens, ranks], y [.., width], out [tokens, width].
void combine(const float* y, const int64_t* rows, const float* weights, int64_t tokens, int64_t ranks, int64_t width,
             float* out);

}  // namespace dymoe

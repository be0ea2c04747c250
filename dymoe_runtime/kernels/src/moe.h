// The routed experts of a layer for the tokens at hand.
#pragma once

#include <vector>

#include "kernels.h"

namespace dymoe {

/// One expert at one tier.
struct Expert {
  MatrixView gate, up, down;
};

/// An expert and the rows of the call that it works on.
struct Job {
  Expert expert;
  int64_t first, count;
};

/// y[i] = (act(x[t] . gate^T) * (x[t] . up^T)) . down^T for the rows i of each job, t = tokens[i],
/// or i where `tokens` is null. x [.., hidden], y [rows, hidden]; all jobs have the same shapes.
/// A row does not depend on which others are in the call.
void moe(const Kernels& isa, const std::vector<Job>& jobs, const float* x, const int64_t* tokens,
         Activation activation, float* y);

/// One token through experts, of which `run` takes some at a time: what `moe` and `combine` make of all of them, in
/// whatever order they come. One at a time in a thread.
class TokenMoe {
 public:
  TokenMoe(const Kernels& isa, const std::vector<const Expert*>& experts, const float* x, Activation activation);

  /// Of the experts those with these numbers.
  void run(const std::vector<int64_t>& ranks);

  /// out = sum over j of gates[j] * expert j of x, [hidden].
  void combine(const float* gates, float* out) const;

 private:
  const Kernels& isa_;
  const std::vector<const Expert*>& experts_;
  const float* x_;
  const Activation activation_;
  const std::vector<int64_t> tokens_;  // of each row, all the same
  std::vector<int64_t> rows_;          // of each expert; -1 where it has not run
  int64_t count_ = 0;                  // rows
  float* y_;                           // [experts, hidden]
};

/// out[t] = sum over j of gates[t, j] * y[rows[t, j]], in that order; rows below 0 are left out.
/// gates and rows [tokens, ranks], out [tokens, width].
void combine(const float* y, const int64_t* rows, const float* gates, int64_t tokens, int64_t ranks, int64_t width,
             float* out);

}  // namespace dymoe

// A routed expert: three matrices of one record, and their biases.
#pragma once

#include <vector>

#include "kernels.h"
#include "record/plan.h"

namespace dymoe {

/// One expert at one tier: gate and up [intermediate, hidden], down [hidden, intermediate].
struct Expert {
  MatrixView gate, up, down;
  const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;  // by row; null for none
};

/// Returns the matrices and biases of an expert as pointers into the segments of its record, which the caller keeps.
/// Throws std::invalid_argument if the record or its segments do not fit.
Expert find_expert(const Plan& plan, int tier, const std::vector<Segment>& segments);

}  // namespace dymoe

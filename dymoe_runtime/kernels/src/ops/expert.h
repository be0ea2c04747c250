// A routed expert: three matrices of one record.
#pragma once

#include <vector>

#include "kernels.h"
#include "ops/plan.h"

namespace dymoe {

/// One expert at one tier: gate and up [intermediate, hidden], down [hidden, intermediate].
struct Expert {
  MatrixView gate, up, down;
};

/// Returns the matrices of an expert as pointers into the segments of its record, which the caller keeps. Throws
/// std::invalid_argument if the record or its segments do not fit.
Expert find_expert(const Plan& plan, int tier, const std::vector<Segment>& segments);

}  // namespace dymoe

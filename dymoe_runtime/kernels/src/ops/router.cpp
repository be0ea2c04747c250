#include "ops/router.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace dymoe {

void select_experts(const Kernels& isa, float* logits, int64_t count, int64_t top_k, bool normalize, int64_t* experts,
                    float* weights) {
  const float sum = isa.exponentials(logits, count);
  if (!std::isfinite(sum)) {  // logits cannot be compared; NaN weights make the result NaN
    for (int64_t j = 0; j < top_k; ++j) experts[j] = j, weights[j] = NAN;
    return;
  }
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + top_k, order.end(),
                    [&](int64_t a, int64_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); });
  float mass = 0.0f;
  for (int64_t j = 0; j < top_k; ++j) {
    experts[j] = order[j];
    weights[j] = logits[order[j]] / sum;
    mass += weights[j];
  }
  if (normalize)
    for (int64_t j = 0; j < top_k; ++j) weights[j] /= mass;
}

}  // namespace dymoe

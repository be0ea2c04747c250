#include "ops/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace dymoe {
namespace {

/// Returns the sum of the `counted` highest of n scores.
float sum_of_highest(const float* scores, int64_t n, int64_t counted) {
  float first = -std::numeric_limits<float>::infinity(), second = first;
  for (int64_t i = 0; i < n; ++i) {
    if (scores[i] > first) {
      second = first, first = scores[i];
    } else if (scores[i] > second) {
      second = scores[i];
    }
  }
  return counted > 1 && n > 1 ? first + second : first;
}

/// Returns the numbers of the `count` highest of n scores, highest first; of equal scores, the lower number first.
std::vector<int64_t> highest(const float* scores, int64_t n, int64_t count) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [&](int64_t a, int64_t b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a < b); });
  order.resize(count);
  return order;
}

/// Replaces the scores outside the best groups by -infinity.
void leave_best_groups(const RouterRule& rule, std::vector<float>& scores) {
  const int64_t size = rule.experts / rule.groups;
  std::vector<float> rank(rule.groups);
  for (int64_t g = 0; g < rule.groups; ++g)
    rank[g] = sum_of_highest(scores.data() + g * size, size, rule.group_by_two ? 2 : 1);
  std::vector<bool> best(rule.groups);
  for (int64_t g : highest(rank.data(), rule.groups, rule.top_groups)) best[g] = true;
  for (int64_t e = 0; e < rule.experts; ++e)
    if (!best[e / size]) scores[e] = -std::numeric_limits<float>::infinity();
}

/// Returns the experts that a rule chooses by scores [experts].
std::vector<int64_t> choose(const RouterRule& rule, const float* scores) {
  if (!rule.select && rule.groups == 1) return highest(scores, rule.experts, rule.top_k);
  std::vector<float> wanted(scores, scores + rule.experts);
  if (rule.select)
    for (int64_t e = 0; e < rule.experts; ++e) wanted[e] += rule.select[e];
  if (rule.groups > 1) leave_best_groups(rule, wanted);
  return highest(wanted.data(), rule.experts, rule.top_k);
}

/// Computes the weights [top_k] of sparsemixer: the share of each chosen expert among those not chosen before it whose
/// logits are near its own.
void share_among_near(const RouterRule& rule, const float* logits, const int64_t* experts, float* weights) {
  for (int64_t j = 0; j < rule.top_k; ++j) {
    const float most = logits[experts[j]];
    float sum = 0.0f;
    for (int64_t e = 0; e < rule.experts; ++e) {
      const bool is_far = (most - logits[e]) / std::max(std::fabs(logits[e]), most) > rule.threshold;
      if (!is_far && std::find(experts, experts + j, e) == experts + j) sum += std::exp(logits[e] - most);
    }
    weights[j] = 1.0f / sum;
  }
}

/// Normalizes and scales the weights [top_k] of the chosen experts.
void scale_weights(const RouterRule& rule, const int64_t* experts, float* weights) {
  if (rule.normalize) {
    const float mass = std::accumulate(weights, weights + rule.top_k, 0.0f) + rule.eps;
    const float divisor = mass < rule.least_sum ? rule.least_sum : mass;
    for (int64_t j = 0; j < rule.top_k; ++j) weights[j] /= divisor;
  }
  for (int64_t j = 0; j < rule.top_k; ++j) {
    if (rule.scale != 1.0f) weights[j] *= rule.scale;
    if (rule.weight_scale) weights[j] *= rule.weight_scale[experts[j]];
  }
}

/// Sorts experts and weights by weight, highest first; of equal weights, the one that was first stays first.
void sort_by_weight(int64_t count, int64_t* experts, float* weights) {
  for (int64_t i = 1; i < count; ++i)
    for (int64_t j = i; j > 0 && weights[j] > weights[j - 1]; --j) {
      std::swap(weights[j], weights[j - 1]);
      std::swap(experts[j], experts[j - 1]);
    }
}

}  // namespace

void check(const RouterRule& r) {
  if (r.experts < 1 || r.top_k < 1 || r.top_k > r.experts)
    throw std::invalid_argument("logits: expected " + std::to_string(r.experts) +
                                " columns, of which 1 or more are chosen");
  if (r.groups < 1 || r.experts % r.groups || r.top_groups < 1 || r.top_groups > r.groups)
    throw std::invalid_argument("a router: its groups do not fit");
}

void select_experts(const Kernels& isa, const RouterRule& rule, float* logits, int64_t* experts, float* weights) {
  float invalid = 0.0f;  // NaN if a logit is not finite
  for (int64_t e = 0; e < rule.experts; ++e) {
    if (rule.softcap > 0.0f) logits[e] = std::tanh(logits[e] / rule.softcap) * rule.softcap;
    invalid += logits[e] * 0.0f;
  }
  if (invalid != 0.0f) {  // logits cannot be compared; NaN weights make the result NaN
    for (int64_t j = 0; j < rule.top_k; ++j) experts[j] = j, weights[j] = NAN;
    return;
  }
  float sum = 1.0f;  // what scores are yet to be divided by, which does not change their order
  if (rule.score == RouterScore::softmax) sum = isa.exponentials(logits, rule.experts);
  if (rule.score == RouterScore::sigmoid)
    for (int64_t e = 0; e < rule.experts; ++e) logits[e] = 1.0f / (1.0f + std::exp(-logits[e]));
  if (rule.select || rule.groups > 1) {
    for (int64_t e = 0; e < rule.experts; ++e) logits[e] /= sum;
    sum = 1.0f;
  }
  const std::vector<int64_t> chosen = choose(rule, logits);
  for (int64_t j = 0; j < rule.top_k; ++j) experts[j] = chosen[j], weights[j] = logits[chosen[j]] / sum;
  if (rule.score == RouterScore::softmax_of_chosen) {
    const float total = isa.exponentials(weights, rule.top_k);
    for (int64_t j = 0; j < rule.top_k; ++j) weights[j] /= total;
  }
  if (rule.score == RouterScore::sparsemixer) share_among_near(rule, logits, experts, weights);
  scale_weights(rule, experts, weights);
  sort_by_weight(rule.top_k, experts, weights);
}

}  // namespace dymoe

// Routing: the choice of experts by a token's logits.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dymoe {

/// What scores are made of: the softmax over all logits, the sigmoid of each, or the logits, of which the chosen ones
/// then go through a softmax, or one with those near them for each.
enum class RouterScore { softmax, sigmoid, softmax_of_chosen, sparsemixer };

/// How a router chooses experts and weighs them, as RouterSpec of spec.py says.
struct RouterRule {
  int64_t experts, top_k;
  RouterScore score;
  int64_t groups, top_groups;  // only experts of the best `top_groups` of so many equal groups; 1 and 1 for all
  bool group_by_two;           // whether a group is ranked by its two highest scores, or by the highest one
  bool normalize;              // whether weights are divided by their sum plus `eps`, or by at least `least_sum`
  float scale, eps, least_sum;
  float softcap;              // logits become softcap * tanh(logits / softcap); 0 for none
  const float* select;        // [experts], added to the scores for the choice alone; null for none
  const float* weight_scale;  // [experts], factors of the weights; null for none
  float threshold;            // of RouterScore::sparsemixer
};

/// Throws std::invalid_argument if the numbers of a rule contradict each other.
void check(const RouterRule& rule);

/// Chooses experts by a token's logits [experts], which are overwritten. Writes the experts and their routing weights
/// [top_k], highest weight first. Of equal scores, the expert with the lower number is chosen first. If the logits are
/// not finite, the first experts are chosen with NaN weights.
void select_experts(const Kernels& isa, const RouterRule& rule, float* logits, int64_t* experts, float* weights);

}  // namespace dymoe

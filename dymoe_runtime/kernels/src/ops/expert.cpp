#include "ops/expert.h"

#include <stdexcept>

namespace dymoe {

Expert find_expert(const Plan& plan, int tier, const std::vector<Segment>& segments) {
  const Expert expert{plan.view("gate", tier, segments), plan.view("up", tier, segments),
                      plan.view("down", tier, segments)};
  if (expert.up.rows != expert.gate.rows || expert.up.cols != expert.gate.cols ||
      expert.down.rows != expert.gate.cols || expert.down.cols != expert.gate.rows)
    throw std::invalid_argument("the shapes of 'gate', 'up' and 'down' do not match");
  return expert;
}

}  // namespace dymoe

#include "record/expert.h"

#include <stdexcept>
#include <string>

namespace dymoe {
namespace {

/// Returns the bias of a matrix with `rows` rows, or null if the record has none called `name`.
const float* find_bias(const Plan& plan, const std::string& name, int64_t rows, const std::vector<Segment>& segments) {
  const VectorView bias = plan.vector(name, segments);
  if (bias.data && bias.length != rows)
    throw std::invalid_argument("'" + name + "' has " + std::to_string(bias.length) + " numbers, expected " +
                                std::to_string(rows));
  return bias.data;
}

}  // namespace

Expert find_expert(const Plan& plan, int tier, const std::vector<Segment>& segments) {
  Expert expert{plan.view("gate", tier, segments), plan.view("up", tier, segments), plan.view("down", tier, segments)};
  if (expert.up.rows != expert.gate.rows || expert.up.cols != expert.gate.cols ||
      expert.down.rows != expert.gate.cols || expert.down.cols != expert.gate.rows)
    throw std::invalid_argument("the shapes of 'gate', 'up' and 'down' do not match");
  expert.gate_bias = find_bias(plan, "gate_bias", expert.gate.rows, segments);
  expert.up_bias = find_bias(plan, "up_bias", expert.up.rows, segments);
  expert.down_bias = find_bias(plan, "down_bias", expert.down.rows, segments);
  return expert;
}

}  // namespace dymoe

// Options of the specifications in spec.py, read from their Python objects.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "ops/delta.h"
#include "ops/router.h"
#include "python/arguments.h"

namespace dymoe {

/// Returns the field `name` of an object of spec.py, or 0 if it is None.
template <class T>
T field(nanobind::handle spec, const char* name) {
  const nanobind::object value = spec.attr(name);
  return value.is_none() ? T{} : nanobind::cast<T>(value);
}

/// Returns the RouterScore that RouterSpec calls `name`.
inline RouterScore score_from(const std::string& name) {
  if (name == "softmax") return RouterScore::softmax;
  if (name == "sigmoid") return RouterScore::sigmoid;
  if (name == "softmax_of_chosen") return RouterScore::softmax_of_chosen;
  if (name == "sparsemixer") return RouterScore::sparsemixer;
  reject("score '" + name + "': expected softmax, sigmoid, softmax_of_chosen or sparsemixer");
}

/// Returns the rule of a RouterSpec, without tensors and not yet checked.
inline RouterRule rule_from(nanobind::handle router) {
  RouterRule rule{};
  rule.experts = field<int64_t>(router, "experts"), rule.top_k = field<int64_t>(router, "top_k");
  rule.score = score_from(field<std::string>(router, "score"));
  rule.groups = field<int64_t>(router, "groups"), rule.top_groups = field<int64_t>(router, "top_groups");
  rule.group_by_two = field<std::string>(router, "group_score") == "top2";
  rule.normalize = field<bool>(router, "normalize");
  rule.scale = field<float>(router, "scale"), rule.eps = field<float>(router, "eps");
  rule.least_sum = field<float>(router, "least_sum"), rule.softcap = field<float>(router, "softcap");
  rule.threshold = field<float>(router, "threshold");
  return rule;
}

/// Returns the shape of a GatedDeltaSpec, not yet checked.
inline DeltaShape delta_shape_from(nanobind::handle spec) {
  return {field<int64_t>(spec, "key_heads"), field<int64_t>(spec, "value_heads"), field<int64_t>(spec, "key_dim"),
          field<int64_t>(spec, "value_dim"), field<int64_t>(spec, "taps")};
}

}  // namespace dymoe

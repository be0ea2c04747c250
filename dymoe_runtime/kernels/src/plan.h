// The layout of a record, checked once, and its matrices found in the segments of a call.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace dymoe {

struct Part {
  int64_t segment, offset, nbytes;
};

struct Plane {
  int width, tier;
  Part part;
};

struct MatrixLayout {
  std::string name;
  int64_t rows, cols;
  std::vector<int> ladder;
  std::vector<Plane> planes;
  std::vector<Part> steps;
  Part multiplier;
};

struct Segment {
  const uint8_t* data;
  int64_t nbytes;
};

/// Throws std::invalid_argument for a layout that is not one, or does not fit the segments.
class Plan {
 public:
  explicit Plan(std::vector<MatrixLayout> matrices);

  const MatrixLayout& matrix(const std::string& name) const;

  /// The matrix called `name` at `tier`. What the view points to lies within `segments`.
  MatrixView view(const std::string& name, int tier, const std::vector<Segment>& segments) const;

 private:
  std::vector<MatrixLayout> matrices_;
};

}  // namespace dymoe

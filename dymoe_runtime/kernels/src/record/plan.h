// The layout of a record, which is checked once and then locates matrices and vectors in the segments of each call.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace dymoe {

/// A byte range of one segment of a record.
struct Part {
  int64_t segment, offset, nbytes;
};

/// `width` bits of each code of a matrix; `tier` is the tier that the plane completes or leads to.
struct Plane {
  int width, tier;
  Part part;
};

/// Where the parts of one matrix lie in a record, as MatrixLayout of tiers.py.
struct MatrixLayout {
  std::string name;
  int64_t rows, cols;
  std::vector<int> ladder;          // tiers in bits, rising
  std::vector<Plane> planes;        // most significant first
  std::vector<Part> scale_indices;  // one for each tier
  Part multiplier;                  // bf16 [rows]
  Grid grid = Grid::usual;
};

/// Where a vector of floats lies in a record.
struct VectorLayout {
  std::string name;
  Part part;
};

/// A vector of floats in the segments of a record.
struct VectorView {
  const float* data;  // [length], or null for none
  int64_t length;
};

/// The bytes of one segment, which the caller keeps.
struct Segment {
  const uint8_t* data;
  int64_t nbytes;
};

/// The checked layouts of all matrices and vectors of a record. All methods throw std::invalid_argument for arguments
/// that do not fit: a layout that contradicts itself, an unknown name or tier, a missing or short segment.
class Plan {
 public:
  explicit Plan(std::vector<MatrixLayout> matrices, std::vector<VectorLayout> vectors = {});

  /// Returns the layout of the matrix called `name`.
  const MatrixLayout& matrix(const std::string& name) const;

  /// Returns the matrix called `name` at `tier`, as pointers into `segments`.
  MatrixView view(const std::string& name, int tier, const std::vector<Segment>& segments) const;

  /// Returns the vector called `name` as a pointer into `segments`, or none if this record has no such vector.
  VectorView vector(const std::string& name, const std::vector<Segment>& segments) const;

 private:
  std::vector<MatrixLayout> matrices_;
  std::vector<VectorLayout> vectors_;
};

}  // namespace dymoe

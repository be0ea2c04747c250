// Checks of the arguments that Python passes, and their conversion for the kernels.
#pragma once

#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "decode/stack.h"
#include "record/plan.h"

namespace dymoe {

// Arrays come as addresses, because importing them through DLPack costs more than a small product. native.py and
// descent_native.py have checked that they are contiguous and of the right type.
using VectorTuple = std::tuple<uintptr_t, int64_t>;  // address, length
using SegmentTuples = std::vector<VectorTuple>;
using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t>;  // address, rows, columns

/// Throws std::invalid_argument, which is ValueError in Python.
[[noreturn]] inline void reject(const std::string& message) { throw std::invalid_argument(message); }

/// Returns the segments at these addresses.
inline std::vector<Segment> segments_from(const SegmentTuples& tuples) {
  std::vector<Segment> segments;
  for (const auto& [address, nbytes] : tuples) segments.push_back({reinterpret_cast<const uint8_t*>(address), nbytes});
  return segments;
}

/// A float matrix whose number of columns has been checked.
struct Matrix {
  float* data;
  int64_t rows;
};

/// Returns a matrix that must have `cols` columns; `name` is for the message.
inline Matrix matrix_from(const MatrixTuple& tuple, const char* name, int64_t cols) {
  const auto [address, rows, found] = tuple;
  if (found != cols)
    reject(std::string(name) + ": expected " + std::to_string(cols) + " columns, got " + std::to_string(found));
  return {reinterpret_cast<float*>(address), rows};
}

/// Returns the data of an output matrix that must be [rows, cols].
inline float* output_from(const MatrixTuple& tuple, int64_t rows, int64_t cols) {
  const Matrix y = matrix_from(tuple, "y", cols);
  if (y.rows != rows) reject("y: expected " + std::to_string(rows) + " rows, got " + std::to_string(y.rows));
  return y.data;
}

/// Returns the activation that Hugging Face configurations call `name`, or the one that `clamped_swiglu` of spec.py has
/// named "clamped_swiglu:alpha:limit".
inline Activation activation_from(const std::string& name) {
  if (name == "silu") return {ActivationKind::silu};
  if (name == "gelu") return {ActivationKind::gelu};
  if (name == "gelu_pytorch_tanh") return {ActivationKind::gelu_tanh};
  const std::string clamped = "clamped_swiglu:";
  if (name.compare(0, clamped.size(), clamped) == 0) {
    std::istringstream numbers(name.substr(clamped.size()));
    numbers.imbue(std::locale::classic());
    Activation activation{ActivationKind::clamped_swiglu};
    char colon = 0;
    if (numbers >> activation.alpha >> colon >> activation.limit && colon == ':' && numbers.peek() == EOF)
      return activation;
  }
  reject("activation '" + name + "': expected silu, gelu, gelu_pytorch_tanh or clamped_swiglu:alpha:limit");
}

// layout, tier, segments, address of the bias or 0
using LinearTuple = std::tuple<const Plan*, int, SegmentTuples, uintptr_t>;

/// Returns the matrix "weight" of a record, and its bias.
inline Linear linear_from(const LinearTuple& t) {
  const auto& [plan, tier, segments, bias] = t;
  return {plan->view("weight", tier, segments_from(segments)), reinterpret_cast<const float*>(bias)};
}

/// Returns the QkNorm that AttentionSpec calls `name`.
inline QkNorm qk_norm_from(const std::string& name) {
  if (name == "none") return QkNorm::none;
  if (name == "head") return QkNorm::head;
  if (name == "full") return QkNorm::full;
  reject("qk_norm '" + name + "': expected none, head or full");
}

// addresses of a layer's keys and values, capacity, bits
using CacheTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int>;

/// Returns a cache that must have room for `positions` positions.
inline LayerCache cache_from(const CacheTuple& tuple, int64_t positions) {
  const auto [keys, values, capacity, bits] = tuple;
  if (bits != 8 && bits != 16 && bits != 32) reject("a cache keeps 8, 16 or 32 bits");
  if (positions < 1 || positions > capacity)
    reject("position " + std::to_string(positions - 1) + " is not below " + std::to_string(capacity));
  return {reinterpret_cast<uint8_t*>(keys), reinterpret_cast<uint8_t*>(values), capacity, bits};
}

// tokens, heads, kv_heads, head_dim
using HeadsOfPromptTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;
// start, window or 0, chunk or 0
using SightTuple = std::tuple<int64_t, int64_t, int64_t>;

/// Returns a checked prompt without sinks.
inline Prompt prompt_from(const HeadsOfPromptTuple& shape, const SightTuple& sight, int64_t last) {
  const auto [tokens, heads, kv_heads, n] = shape;
  const auto [start, window, chunk] = sight;
  if (tokens < 1 || kv_heads < 1 || heads < 1 || heads % kv_heads || n < 2 || n % 2 || start < 0 || window < 0 ||
      chunk < 0 || last < 0 || last > tokens)
    reject("attention: the shapes do not fit");
  return {tokens, heads, kv_heads, n, start, window, last, chunk, nullptr};
}

/// Sets the tiers of a descent or a fit and their weights; bits must rise within 2..most.
template <class Task>
void take_tiers(Task& task, const std::vector<int>& bits, const std::vector<float>& weights, int most) {
  task.tiers = int(bits.size());
  if (bits.empty() || task.tiers > kMaxTiers || weights.size() != bits.size())
    reject("bits: one weight is needed for each of 1.." + std::to_string(kMaxTiers) + " tiers");
  for (int t = 0; t < task.tiers; ++t) {
    if (bits[t] < 2 || bits[t] > most || (t && bits[t] <= bits[t - 1]))
      reject("bits: expected rising numbers of 2.." + std::to_string(most));
    task.bits[t] = bits[t], task.weights[t] = weights[t];
  }
}

// The layout of a matrix, as native.py passes it: name, rows, columns, ladder, planes, scale indices, multiplier, grid.
using PartTuple = std::tuple<int64_t, int64_t, int64_t>;  // segment, offset, bytes
using PlaneTuple = std::tuple<int, int, PartTuple>;       // width, tier, part
using LayoutTuple = std::tuple<std::string, int64_t, int64_t, std::vector<int>, std::vector<PlaneTuple>,
                               std::vector<PartTuple>, PartTuple, std::string>;

inline Part part_from(const PartTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

/// Returns the grid that tiers.py calls `name`.
inline Grid grid_from(const std::string& name) {
  if (name.empty()) return Grid::usual;
  if (name == "mxfp4") return Grid::mxfp4;
  if (name == "trellis") return Grid::trellis;
  reject("grid '" + name + "': expected '', mxfp4 or trellis");
}

inline MatrixLayout layout_from(const LayoutTuple& t) {
  MatrixLayout m{
      std::get<0>(t),           std::get<1>(t), std::get<2>(t), std::get<3>(t), {}, {}, part_from(std::get<6>(t)),
      grid_from(std::get<7>(t))};
  for (const PlaneTuple& plane : std::get<4>(t))
    m.planes.push_back({std::get<0>(plane), std::get<1>(plane), part_from(std::get<2>(plane))});
  for (const PartTuple& part : std::get<5>(t)) m.scale_indices.push_back(part_from(part));
  return m;
}

// name, part
using VectorLayoutTuple = std::tuple<std::string, PartTuple>;

/// Returns the checked layout of a record.
inline Plan make_plan(const std::vector<LayoutTuple>& matrices, const std::vector<VectorLayoutTuple>& vectors) {
  std::vector<MatrixLayout> layouts;
  for (const LayoutTuple& matrix : matrices) layouts.push_back(layout_from(matrix));
  std::vector<VectorLayout> places;
  for (const auto& [name, part] : vectors) places.push_back({name, part_from(part)});
  return Plan(std::move(layouts), std::move(places));
}

/// Returns *expert; null is an expert that other kernels prepared.
inline const Expert& prepared(const Expert* expert) {
  if (!expert) reject("an expert was not prepared by the compiled kernels");
  return *expert;
}

}  // namespace dymoe

// Checks of the arguments that Python passes, and their conversion for the kernels.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "decode/stack.h"
#include "ops/plan.h"

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

/// Returns the activation that Hugging Face configurations call `name`.
inline Activation activation_from(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  reject("activation '" + name + "': expected silu, gelu or gelu_pytorch_tanh");
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

/// Returns a checked prompt; the shape is (tokens, heads, kv_heads, head_dim).
inline Prompt prompt_from(const std::tuple<int64_t, int64_t, int64_t, int64_t>& shape, int64_t start, int64_t window,
                          int64_t last) {
  const auto [tokens, heads, kv_heads, n] = shape;
  if (tokens < 1 || kv_heads < 1 || heads < 1 || heads % kv_heads || n < 2 || n % 2 || start < 0 || window < 0 ||
      last < 0 || last > tokens)
    reject("attention: the shapes do not fit");
  return {tokens, heads, kv_heads, n, start, window, last};
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

// The layout of a matrix, as native.py passes it: name, rows, columns, ladder, planes, scale indices, multiplier.
using PartTuple = std::tuple<int64_t, int64_t, int64_t>;  // segment, offset, bytes
using PlaneTuple = std::tuple<int, int, PartTuple>;       // width, tier, part
using LayoutTuple = std::tuple<std::string, int64_t, int64_t, std::vector<int>, std::vector<PlaneTuple>,
                               std::vector<PartTuple>, PartTuple>;

inline Part part_from(const PartTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

inline MatrixLayout layout_from(const LayoutTuple& t) {
  MatrixLayout m{std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), {}, {}, part_from(std::get<6>(t))};
  for (const PlaneTuple& plane : std::get<4>(t))
    m.planes.push_back({std::get<0>(plane), std::get<1>(plane), part_from(std::get<2>(plane))});
  for (const PartTuple& part : std::get<5>(t)) m.scale_indices.push_back(part_from(part));
  return m;
}

/// Returns the checked layout of a record.
inline Plan make_plan(const std::vector<LayoutTuple>& matrices) {
  std::vector<MatrixLayout> layouts;
  for (const LayoutTuple& matrix : matrices) layouts.push_back(layout_from(matrix));
  return Plan(std::move(layouts));
}

/// Returns *expert; null is an expert that other kernels prepared.
inline const Expert& prepared(const Expert* expert) {
  if (!expert) reject("an expert was not prepared by the compiled kernels");
  return *expert;
}

}  // namespace dymoe

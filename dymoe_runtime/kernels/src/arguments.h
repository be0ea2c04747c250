// What Python passes, checked and made into what the kernels take.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "moe.h"
#include "plan.h"
#include "step.h"

namespace dymoe {

// Arrays come as addresses: importing them through DLPack costs more than a small product.
// native.py and fitting.py have checked their types and that they are contiguous.
using VectorTuple = std::tuple<uintptr_t, int64_t>;
using SegmentTuples = std::vector<VectorTuple>;
using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t>;

[[noreturn]] inline void reject(const std::string& message) { throw std::invalid_argument(message); }

inline std::vector<Segment> segments_from(const SegmentTuples& tuples) {
  std::vector<Segment> segments;
  for (const auto& [address, nbytes] : tuples) segments.push_back({reinterpret_cast<const uint8_t*>(address), nbytes});
  return segments;
}

struct Matrix {
  float* data;
  int64_t rows;
};

inline Matrix matrix_from(const MatrixTuple& tuple, const char* name, int64_t cols) {
  const auto [address, rows, found] = tuple;
  if (found != cols)
    reject(std::string(name) + ": expected " + std::to_string(cols) + " columns, got " + std::to_string(found));
  return {reinterpret_cast<float*>(address), rows};
}

inline float* output_from(const MatrixTuple& tuple, int64_t rows, int64_t cols) {
  const Matrix y = matrix_from(tuple, "y", cols);
  if (y.rows != rows) reject("y: expected " + std::to_string(rows) + " rows, got " + std::to_string(y.rows));
  return y.data;
}

inline Activation activation_from(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  reject("activation '" + name + "': expected silu, gelu or gelu_pytorch_tanh");
}

// record, its layout, tier, bias or 0
using LinearTuple = std::tuple<const Plan*, int, SegmentTuples, uintptr_t>;

inline Linear linear_from(const LinearTuple& t) {
  const auto& [plan, tier, segments, bias] = t;
  return {plan->view("weight", tier, segments_from(segments)), reinterpret_cast<const float*>(bias)};
}

inline QkNorm qk_norm_from(const std::string& name) {
  if (name == "none") return QkNorm::none;
  if (name == "head") return QkNorm::head;
  if (name == "full") return QkNorm::full;
  reject("qk_norm '" + name + "': expected none, head or full");
}

// Of a layer's keys and values; capacity, bits.
using CacheTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int>;

inline LayerCache cache_from(const CacheTuple& tuple, int64_t positions) {
  const auto [keys, values, capacity, bits] = tuple;
  if (bits != 8 && bits != 16 && bits != 32) reject("a cache keeps 8, 16 or 32 bits");
  if (positions < 1 || positions > capacity)
    reject("position " + std::to_string(positions - 1) + " is not below " + std::to_string(capacity));
  return {reinterpret_cast<uint8_t*>(keys), reinterpret_cast<uint8_t*>(values), capacity, bits};
}

inline Prompt prompt_from(const std::tuple<int64_t, int64_t, int64_t, int64_t>& shape, int64_t start, int64_t window,
                   int64_t last) {
  const auto [tokens, heads, kv_heads, n] = shape;
  if (tokens < 1 || kv_heads < 1 || heads < 1 || heads % kv_heads || n < 2 || n % 2 || start < 0 || window < 0 ||
      last < 0 || last > tokens)
    reject("attention: the shapes do not fit");
  return {tokens, heads, kv_heads, n, start, window, last};
}

/// Fills in the tiers of a descent or a fit.
template <class Work>
void take_tiers(Work& work, const std::vector<int>& bits, const std::vector<float>& weights, int most) {
  work.tiers = int(bits.size());
  if (bits.empty() || work.tiers > kMaxTiers || weights.size() != bits.size())
    reject("bits: one weight is needed for each of 1.." + std::to_string(kMaxTiers) + " tiers");
  for (int t = 0; t < work.tiers; ++t) {
    if (bits[t] < 2 || bits[t] > most || (t && bits[t] <= bits[t - 1]))
      reject("bits: expected rising numbers of 2.." + std::to_string(most));
    work.bits[t] = bits[t], work.weights[t] = weights[t];
  }
}

// What native.py passes for a layout.
using PartTuple = std::tuple<int64_t, int64_t, int64_t>;
using PlaneTuple = std::tuple<int, int, PartTuple>;
using LayoutTuple = std::tuple<std::string, int64_t, int64_t, std::vector<int>, std::vector<PlaneTuple>,
                               std::vector<PartTuple>, PartTuple>;

inline Part part_from(const PartTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

inline MatrixLayout layout_from(const LayoutTuple& t) {
  MatrixLayout m{std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), {}, {}, part_from(std::get<6>(t))};
  for (const PlaneTuple& plane : std::get<4>(t))
    m.planes.push_back({std::get<0>(plane), std::get<1>(plane), part_from(std::get<2>(plane))});
  for (const PartTuple& part : std::get<5>(t)) m.steps.push_back(part_from(part));
  return m;
}

inline Plan make_plan(const std::vector<LayoutTuple>& matrices) {
  std::vector<MatrixLayout> layouts;
  for (const LayoutTuple& matrix : matrices) layouts.push_back(layout_from(matrix));
  return Plan(std::move(layouts));
}

inline void check_prepared(const Expert* expert) {
  if (!expert) reject("an expert was not prepared by the compiled kernels");
}

}  // namespace dymoe

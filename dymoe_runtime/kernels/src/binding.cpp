// The module dymoe_runtime.kernels._native: checks every argument, then runs without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "isa.h"
#include "ops.h"
#include "plan.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dymoe {
namespace {

// Tensors come as addresses: importing them through DLPack costs more than a small product.
// native.py has checked their types and that they are contiguous.
using SegmentTuples = std::vector<std::tuple<uintptr_t, int64_t>>;
using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t>;

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument(message); }

std::vector<Segment> segments_from(const SegmentTuples& tuples) {
  std::vector<Segment> segments;
  for (const auto& [address, nbytes] : tuples) segments.push_back({reinterpret_cast<const uint8_t*>(address), nbytes});
  return segments;
}

struct Matrix {
  float* data;
  int64_t rows;
};

Matrix matrix_from(const MatrixTuple& tuple, const char* name, int64_t cols) {
  const auto [address, rows, found] = tuple;
  if (found != cols)
    reject(std::string(name) + ": expected " + std::to_string(cols) + " columns, got " + std::to_string(found));
  return {reinterpret_cast<float*>(address), rows};
}

float* output_from(const MatrixTuple& tuple, int64_t rows, int64_t cols) {
  const Matrix y = matrix_from(tuple, "y", cols);
  if (y.rows != rows) reject("y: expected " + std::to_string(rows) + " rows, got " + std::to_string(y.rows));
  return y.data;
}

Activation activation_from(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  reject("activation '" + name + "': expected silu, gelu or gelu_pytorch_tanh");
}

void run_ffn(const Plan& plan, const std::string& isa, int tier, const SegmentTuples& tuples, const MatrixTuple& x,
             const MatrixTuple& y, const std::string& activation) {
  const std::vector<Segment> segments = segments_from(tuples);
  const MatrixView gate = plan.view("gate", tier, segments), up = plan.view("up", tier, segments),
                   down = plan.view("down", tier, segments);
  if (up.rows != gate.rows || up.cols != gate.cols || down.rows != gate.cols || down.cols != gate.rows)
    reject("the shapes of 'gate', 'up' and 'down' do not match");
  const Matrix from = matrix_from(x, "x", gate.cols);
  float* to = output_from(y, from.rows, down.rows);
  const Kernels& kernels = find_isa(isa);
  const Activation function = activation_from(activation);
  nb::gil_scoped_release unlocked;
  ffn(kernels, gate, up, down, from.data, from.rows, function, to);
}

void run_linear(const Plan& plan, const std::string& isa, int tier, const SegmentTuples& tuples, const MatrixTuple& x,
                const MatrixTuple& y) {
  const MatrixView weight = plan.view("weight", tier, segments_from(tuples));
  const Matrix from = matrix_from(x, "x", weight.cols);
  float* to = output_from(y, from.rows, weight.rows);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  linear(kernels, weight, from.data, from.rows, to);
}

void run_embed(const Plan& plan, const std::string& isa, int tier, const SegmentTuples& tuples,
               const std::tuple<uintptr_t, int64_t>& ids, const MatrixTuple& y) {
  const MatrixView weight = plan.view("weight", tier, segments_from(tuples));
  const auto* wanted = reinterpret_cast<const int64_t*>(std::get<0>(ids));
  const int64_t count = std::get<1>(ids);
  for (int64_t i = 0; i < count; ++i)
    if (wanted[i] < 0 || wanted[i] >= weight.rows)
      reject("ids: " + std::to_string(wanted[i]) + " is not in 0.." + std::to_string(weight.rows - 1));
  float* to = output_from(y, count, weight.cols);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  rows(kernels, weight, wanted, count, to);
}

void run_dequantize(const Plan& plan, const std::string& isa, int tier, const SegmentTuples& tuples,
                    const std::string& name, const MatrixTuple& y) {
  const MatrixView weight = plan.view(name, tier, segments_from(tuples));
  float* to = output_from(y, weight.rows, weight.cols);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  rows(kernels, weight, nullptr, weight.rows, to);
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

void run_fit(const std::string& isa, const std::vector<int>& bits, const std::vector<float>& weights,
             const MatrixTuple& weight, uintptr_t importance, int starts, uintptr_t start, uintptr_t scales,
             uintptr_t codes) {
  Fit f{};
  take_tiers(f, bits, weights, kMostFittedBits);
  const auto [address, rows, cols] = weight;
  if (starts < 1) reject("starts: expected at least one");
  f.rows = rows, f.cols = cols, f.starts = starts;
  f.weight = reinterpret_cast<const float*>(address), f.importance = reinterpret_cast<const float*>(importance);
  f.start = reinterpret_cast<const float*>(start), f.scales = reinterpret_cast<float*>(scales);
  f.codes = reinterpret_cast<uint8_t*>(codes);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  fit(kernels, f);
}

void run_descend(const std::string& isa, const std::vector<int>& bits, const std::vector<float>& weights,
                 const MatrixTuple& hessian, int64_t hessian_pitch, const MatrixTuple& slope, uintptr_t units,
                 uintptr_t scales, uintptr_t error, uintptr_t codes, int64_t pitch, bool last) {
  Descent d{};
  take_tiers(d, bits, weights, 8);
  const auto [address, rows, cols] = slope;
  if (rows % d.tiers) reject("slope: expected as many rows for each tier");
  d.rows = rows / d.tiers, d.cols = cols, d.pitch = pitch, d.last = last;
  if (cols < 1 || cols > kBlock || pitch < cols) reject("slope: expected 1.." + std::to_string(kBlock) + " columns");
  const Matrix square = matrix_from(hessian, "hessian", cols);
  if (square.rows != cols) reject("hessian: expected as many rows as columns");
  d.hessian = square.data, d.hessian_pitch = hessian_pitch;
  d.slope = reinterpret_cast<const float*>(address), d.units = reinterpret_cast<const float*>(units);
  d.scales = reinterpret_cast<float*>(scales), d.error = reinterpret_cast<float*>(error);
  d.codes = reinterpret_cast<uint8_t*>(codes);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  descend(kernels, d);
}

// What native.py passes for a layout.
using PartTuple = std::tuple<int64_t, int64_t, int64_t>;
using PlaneTuple = std::tuple<int, int, PartTuple>;
using LayoutTuple = std::tuple<std::string, int64_t, int64_t, std::vector<int>, std::vector<PlaneTuple>,
                               std::vector<PartTuple>, PartTuple>;

Part part_from(const PartTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

MatrixLayout layout_from(const LayoutTuple& t) {
  MatrixLayout m{std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), {}, {}, part_from(std::get<6>(t))};
  for (const PlaneTuple& plane : std::get<4>(t))
    m.planes.push_back({std::get<0>(plane), std::get<1>(plane), part_from(std::get<2>(plane))});
  for (const PartTuple& part : std::get<5>(t)) m.steps.push_back(part_from(part));
  return m;
}

Plan make_plan(const std::vector<LayoutTuple>& matrices) {
  std::vector<MatrixLayout> layouts;
  for (const LayoutTuple& matrix : matrices) layouts.push_back(layout_from(matrix));
  return Plan(std::move(layouts));
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available_isas()) names.push_back(kernels->name);
  return names;
}

}  // namespace
}  // namespace dymoe

NB_MODULE(_native, m) {
  using namespace dymoe;
  nb::class_<Plan>(m, "Plan")
      .def_static("make", &make_plan, "matrices"_a)
      .def("ffn", &run_ffn, "isa"_a, "tier"_a, "segments"_a, "x"_a, "y"_a, "activation"_a)
      .def("linear", &run_linear, "isa"_a, "tier"_a, "segments"_a, "x"_a, "y"_a)
      .def("embed", &run_embed, "isa"_a, "tier"_a, "segments"_a, "ids"_a, "y"_a)
      .def("dequantize", &run_dequantize, "isa"_a, "tier"_a, "segments"_a, "name"_a, "y"_a);
  m.def("descend", &run_descend, "isa"_a, "bits"_a, "weights"_a, "hessian"_a, "hessian_pitch"_a, "slope"_a, "units"_a,
        "scales"_a, "error"_a, "codes"_a, "pitch"_a, "last"_a);
  m.def("fit", &run_fit, "isa"_a, "bits"_a, "weights"_a, "weight"_a, "importance"_a, "starts"_a, "start"_a, "scales"_a,
        "codes"_a);
  m.def("available_isas", &isa_names);
  m.def("threads", &threads);
  m.def("set_threads", &set_threads, "count"_a);
}

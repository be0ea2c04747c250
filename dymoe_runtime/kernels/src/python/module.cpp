// The Python module dymoe_runtime.kernels._native. It converts arguments, checks shapes and indices, and runs the
// kernels without the GIL. Addresses are not checked: native.py takes them from contiguous arrays of the right type.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "isa/isa.h"
#include "ops/ops.h"
#include "ops/router.h"
#include "python/arguments.h"
#include "python/bind.h"
#include "python/specs.h"
#include "threads/pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dymoe {
namespace {

Expert make_expert(const Plan& plan, int tier, const SegmentTuples& tuples) {
  return find_expert(plan, tier, segments_from(tuples));
}

// expert, first row, number of rows
using RowsTuple = std::tuple<const Expert*, int64_t, int64_t>;

void run_moe(const std::string& isa, const std::vector<RowsTuple>& tuples, const MatrixTuple& x,
             const VectorTuple& tokens, const MatrixTuple& y, const std::string& activation) {
  if (tuples.empty()) return;
  std::vector<ExpertRows> parts;
  for (const auto& [expert, first, count] : tuples) parts.push_back({prepared(expert), first, count});
  const int64_t hidden = parts[0].expert.gate.cols;
  const Matrix from = matrix_from(x, "x", hidden);
  const auto [ids, rows] = tokens;
  float* to = output_from(y, rows, hidden);
  const auto* wanted = reinterpret_cast<const int64_t*>(ids);
  check(parts, wanted, rows, from.rows);
  const Kernels& kernels = find_isa(isa);
  const Activation function = activation_from(activation);
  nb::gil_scoped_release unlocked;
  moe(kernels, parts, from.data, wanted, function, to);
}

/// rows [tokens, ranks] has a shape of its own, which is checked so that nothing is read past its end.
void run_combine(const MatrixTuple& y, const MatrixTuple& weights, const MatrixTuple& rows, const MatrixTuple& out) {
  const auto [weight, tokens, ranks] = weights;
  const auto [indices, their_tokens, their_ranks] = rows;
  if (their_tokens != tokens || their_ranks != ranks)
    reject("rows: expected " + std::to_string(tokens) + " x " + std::to_string(ranks));
  const int64_t width = std::get<2>(y);
  const Matrix from = matrix_from(y, "y", width);
  float* to = output_from(out, tokens, width);
  const auto* wanted = reinterpret_cast<const int64_t*>(indices);
  for (int64_t i = 0; i < tokens * ranks; ++i)
    if (wanted[i] >= from.rows)
      reject("rows: " + std::to_string(wanted[i]) + " is not below " + std::to_string(from.rows));
  nb::gil_scoped_release unlocked;
  combine(from.data, wanted, reinterpret_cast<const float*>(weight), tokens, ranks, width, to);
}

void run_norm(const std::string& isa, const MatrixTuple& x, uintptr_t weight, float eps, const MatrixTuple& out) {
  const auto [address, tokens, n] = x;
  float* to = output_from(out, tokens, n);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  norms(kernels, reinterpret_cast<const float*>(address), reinterpret_cast<const float*>(weight), tokens, n, eps, to);
}

/// bias may be 0.
void run_layer_norm(const std::string& isa, const MatrixTuple& x, uintptr_t weight, uintptr_t bias, float eps,
                    const MatrixTuple& out) {
  const auto [address, tokens, n] = x;
  float* to = output_from(out, tokens, n);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  layer_norms(kernels, reinterpret_cast<const float*>(address), reinterpret_cast<const float*>(weight),
              reinterpret_cast<const float*>(bias), tokens, n, eps, to);
}

/// x is [tokens, heads * n]; cosines and sines are [tokens, turning].
void run_rotate(const MatrixTuple& x, int64_t n, const MatrixTuple& cosines, uintptr_t sines) {
  const auto [address, tokens, width] = x;
  const auto [cosine, rows, turning] = cosines;
  if (rows != tokens || turning < 2 || turning % 2 || turning > n || width % n)
    reject("rotate: the table does not fit the heads");
  nb::gil_scoped_release unlocked;
  rotate(reinterpret_cast<float*>(address), tokens, width / n, n, turning, reinterpret_cast<const float*>(cosine),
         reinterpret_cast<const float*>(sines));
}

/// Computes y = x . weight^T; the weight [rows, cols] has floats or bf16.
void run_matmul(const std::string& isa, const MatrixTuple& x, uintptr_t weight, bool is_bf16, const MatrixTuple& y) {
  const auto [address, tokens, cols] = x;
  const int64_t rows = std::get<2>(y);
  float* to = output_from(y, tokens, rows);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  matmul(kernels, reinterpret_cast<const void*>(weight), is_bf16, rows, cols, reinterpret_cast<const float*>(address),
         tokens, to);
}

/// Computes hidden = act(hidden) * ups; ups has the shape of hidden.
void run_activate(const std::string& isa, const MatrixTuple& hidden, uintptr_t ups, const std::string& activation) {
  const auto [address, rows, cols] = hidden;
  const Kernels& kernels = find_isa(isa);
  const Activation function = activation_from(activation);
  nb::gil_scoped_release unlocked;
  activate(kernels, function, rows * cols, reinterpret_cast<const float*>(ups), reinterpret_cast<float*>(address));
}

/// Overwrites logits [tokens, experts]; router is a RouterSpec, select and scale are addresses of [experts] or 0,
/// experts and weights are [tokens, top_k].
void run_route(const std::string& isa, const MatrixTuple& logits, nb::handle router, uintptr_t select, uintptr_t scale,
               uintptr_t experts, const MatrixTuple& weights) {
  RouterRule rule = rule_from(router);
  check(rule);
  rule.select = reinterpret_cast<const float*>(select), rule.weight_scale = reinterpret_cast<const float*>(scale);
  const Matrix from = matrix_from(logits, "logits", rule.experts);
  float* to = output_from(weights, from.rows, rule.top_k);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  for (int64_t t = 0; t < from.rows; ++t)
    select_experts(kernels, rule, from.data + t * rule.experts, reinterpret_cast<int64_t*>(experts) + t * rule.top_k,
                   to + t * rule.top_k);
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

void run_embed(const Plan& plan, const std::string& isa, int tier, const SegmentTuples& tuples, const VectorTuple& ids,
               const MatrixTuple& y) {
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

int64_t run_receiving_parts(const std::string& isa, const HeadsOfPromptTuple& shape, int64_t last) {
  return receiving_parts(find_isa(isa), prompt_from(shape, {0, 0, 0}, last));
}

/// vectors are the addresses of queries, keys, values, out, and sinks or 0; received is [receiving_parts, tokens].
void run_attend_prompt(const std::string& isa, const HeadsOfPromptTuple& shape, const SightTuple& sight, int64_t last,
                       const std::vector<uintptr_t>& vectors, const CacheTuple& cache, const MatrixTuple& received) {
  Prompt prompt = prompt_from(shape, sight, last);
  const LayerCache rows = cache_from(cache, prompt.start + prompt.tokens);
  const Kernels& kernels = find_isa(isa);
  float* parts = output_from(received, receiving_parts(kernels, prompt), prompt.tokens);
  if (vectors.size() != 5) reject("attention: expected queries, keys, values, out and sinks");
  const auto floats = [&](int i) { return reinterpret_cast<float*>(vectors[i]); };
  prompt.sinks = floats(4);
  nb::gil_scoped_release unlocked;
  append(kernels, prompt, floats(1), floats(2), rows);
  attend_prompt(kernels, prompt, floats(0), rows, floats(3), parts);
}

/// spec is a GatedDeltaSpec; mixed is [tokens, channels], rates [tokens, 2 * value_heads] and y [tokens, values];
/// vectors are the addresses of conv, a_log, dt_bias, tail and memory.
void run_gated_delta(const std::string& isa, nb::handle spec, const MatrixTuple& mixed, const MatrixTuple& rates,
                     const std::vector<uintptr_t>& vectors, const MatrixTuple& y) {
  const DeltaShape shape = delta_shape_from(spec);
  check(shape);
  const Matrix from = matrix_from(mixed, "mixed", channels_of(shape));
  const Matrix of_heads = matrix_from(rates, "rates", 2 * shape.value_heads);
  if (of_heads.rows != from.rows) reject("rates: expected " + std::to_string(from.rows) + " rows");
  float* to = output_from(y, from.rows, values_of(shape));
  if (vectors.size() != 5) reject("gated_delta: expected conv, a_log, dt_bias, tail and memory");
  const auto floats = [&](int i) { return reinterpret_cast<float*>(vectors[i]); };
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  gated_delta(kernels, shape, from.rows, from.data, of_heads.data, {floats(0), floats(1), floats(2)},
              {floats(3), floats(4)}, to);
}

void run_fit(const std::string& isa, const std::vector<int>& bits, const std::vector<float>& weights,
             const MatrixTuple& weight, uintptr_t importance, int starts, uintptr_t start, uintptr_t scales,
             uintptr_t codes) {
  Fit f{};
  take_tiers(f, bits, weights, kMaxFittedBits);
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
                 uintptr_t scales, uintptr_t error, uintptr_t codes, int64_t pitch, bool last, bool whole, bool trellis,
                 uintptr_t weight) {
  Descent d{};
  take_tiers(d, bits, weights, 8);
  const auto [address, rows, cols] = slope;
  if (rows % d.tiers) reject("slope: expected as many rows for each tier");
  d.rows = rows / d.tiers, d.cols = cols, d.pitch = pitch, d.last = last, d.whole = whole;
  if (whole && d.tiers != 1) reject("whole numbers have one tier");
  if (cols < 1 || cols > kBlock || pitch < cols) reject("slope: expected 1.." + std::to_string(kBlock) + " columns");
  const Matrix square = matrix_from(hessian, "hessian", cols);
  if (square.rows != cols) reject("hessian: expected as many rows as columns");
  d.hessian = square.data, d.hessian_pitch = hessian_pitch;
  d.slope = reinterpret_cast<const float*>(address), d.units = reinterpret_cast<const float*>(units);
  d.scales = reinterpret_cast<float*>(scales), d.error = reinterpret_cast<float*>(error);
  d.codes = reinterpret_cast<uint8_t*>(codes);
  d.trellis = trellis, d.weight = reinterpret_cast<const float*>(weight);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  descend(kernels, d);
}

uint64_t run_read_memory(const VectorTuple& data) {
  const auto [address, nbytes] = data;
  nb::gil_scoped_release unlocked;
  return read_memory(reinterpret_cast<const uint8_t*>(address), nbytes);
}

/// What the attribute __array_struct__ of a NumPy array points to: NumPy's documentation, "The array interface
/// protocol". Unlike Py_buffer it is there in all versions of Python that one extension serves.
struct ArrayInterface {
  int two, dims;
  char kind;
  int itemsize, flags;
  Py_ssize_t *shape, *strides;
  void* data;
  PyObject* descr;
};
constexpr int kContiguous = 0x1, kAligned = 0x100, kNotSwapped = 0x200;

/// Returns address, rows and columns of a contiguous float32 array [rows, cols], or None for anything else.
nb::object matrix_at(nb::handle array) {
  static PyObject* const name = PyUnicode_InternFromString("__array_struct__");
  const nb::object capsule = nb::steal(PyObject_GetAttr(array.ptr(), name));
  const void* found = capsule ? PyCapsule_GetPointer(capsule.ptr(), nullptr) : nullptr;
  if (!found) {
    PyErr_Clear();
    return nb::none();
  }
  const auto& view = *static_cast<const ArrayInterface*>(found);
  constexpr int plain = kContiguous | kAligned | kNotSwapped;
  if (view.two != 2 || view.dims != 2 || view.kind != 'f' || view.itemsize != sizeof(float) ||
      (view.flags & plain) != plain)
    return nb::none();
  return nb::make_tuple(reinterpret_cast<uintptr_t>(view.data), view.shape[0], view.shape[1]);
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
  nb::set_leak_warnings(false);  // a program may end without closing a model, which is no leak
  nb::class_<Expert>(m, "Expert");
  nb::class_<Plan>(m, "Plan")
      .def_static("make", &make_plan, "matrices"_a, "vectors"_a)
      .def("expert", &make_expert, "tier"_a, "segments"_a)
      .def("linear", &run_linear, "isa"_a, "tier"_a, "segments"_a, "x"_a, "y"_a)
      .def("embed", &run_embed, "isa"_a, "tier"_a, "segments"_a, "ids"_a, "y"_a)
      .def("dequantize", &run_dequantize, "isa"_a, "tier"_a, "segments"_a, "name"_a, "y"_a);
  bind_reads(m);
  bind_decode(m);
  m.def("moe", &run_moe, "isa"_a, "parts"_a, "x"_a, "tokens"_a, "y"_a, "activation"_a);
  m.def("combine", &run_combine, "y"_a, "weights"_a, "rows"_a, "out"_a);
  m.def("matmul", &run_matmul, "isa"_a, "x"_a, "weight"_a, "is_bf16"_a, "y"_a);
  m.def("activate", &run_activate, "isa"_a, "hidden"_a, "ups"_a, "activation"_a);
  m.def("route", &run_route, "isa"_a, "logits"_a, "router"_a, "select"_a, "scale"_a, "experts"_a, "weights"_a);
  m.def("norm", &run_norm, "isa"_a, "x"_a, "weight"_a, "eps"_a, "out"_a);
  m.def("layer_norm", &run_layer_norm, "isa"_a, "x"_a, "weight"_a, "bias"_a, "eps"_a, "out"_a);
  m.def("rotate", &run_rotate, "x"_a, "n"_a, "cosines"_a, "sines"_a);
  m.def("receiving_parts", &run_receiving_parts, "isa"_a, "shape"_a, "last"_a);
  m.def("attend_prompt", &run_attend_prompt, "isa"_a, "shape"_a, "sight"_a, "last"_a, "vectors"_a, "cache"_a,
        "received"_a);
  m.def("gated_delta", &run_gated_delta, "isa"_a, "spec"_a, "mixed"_a, "rates"_a, "vectors"_a, "y"_a);
  m.def("descend", &run_descend, "isa"_a, "bits"_a, "weights"_a, "hessian"_a, "hessian_pitch"_a, "slope"_a, "units"_a,
        "scales"_a, "error"_a, "codes"_a, "pitch"_a, "last"_a, "whole"_a, "trellis"_a, "weight"_a);
  m.def("fit", &run_fit, "isa"_a, "bits"_a, "weights"_a, "weight"_a, "importance"_a, "starts"_a, "start"_a, "scales"_a,
        "codes"_a);
  m.def("matrix_at", &matrix_at, "array"_a);
  m.def("available_isas", &isa_names);
  m.def("read_memory", &run_read_memory, "data"_a);
  m.def("threads", &threads);
  m.def("set_threads", &set_threads, "count"_a);
  m.def("pin_threads", &pin_threads, "pinned"_a);
}

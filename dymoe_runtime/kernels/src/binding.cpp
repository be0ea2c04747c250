// The module dymoe_runtime.kernels._native: checks every argument, then runs without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>

#include "arguments.h"
#include "isa.h"
#include "ops.h"
#include "pool.h"
#include "reads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dymoe {
namespace {

/// What the segments hold, which Python keeps.
Expert make_expert(const Plan& plan, int tier, const SegmentTuples& tuples) {
  const std::vector<Segment> segments = segments_from(tuples);
  const Expert expert{plan.view("gate", tier, segments), plan.view("up", tier, segments),
                      plan.view("down", tier, segments)};
  if (expert.up.rows != expert.gate.rows || expert.up.cols != expert.gate.cols ||
      expert.down.rows != expert.gate.cols || expert.down.cols != expert.gate.rows)
    reject("the shapes of 'gate', 'up' and 'down' do not match");
  return expert;
}

void check_prepared(const Expert* expert) {
  if (!expert) reject("an expert was not prepared by the compiled kernels");
}

// expert, first row, rows
using JobTuple = std::tuple<const Expert*, int64_t, int64_t>;

void run_moe(const std::string& isa, const std::vector<JobTuple>& tuples, const MatrixTuple& x,
             const VectorTuple& tokens, const MatrixTuple& y, const std::string& activation) {
  if (tuples.empty()) return;
  for (const JobTuple& job : tuples) check_prepared(std::get<0>(job));
  const MatrixView& gate = std::get<0>(tuples[0])->gate;
  const Matrix from = matrix_from(x, "x", gate.cols);
  const auto [ids, rows] = tokens;
  float* to = output_from(y, rows, gate.cols);
  const auto* wanted = reinterpret_cast<const int64_t*>(ids);
  std::vector<Job> jobs;
  for (const auto& [expert, first, count] : tuples) {
    if (expert->gate.rows != gate.rows || expert->gate.cols != gate.cols) reject("jobs: their shapes differ");
    if (first < 0 || count < 0 || count > rows || first > rows - count)
      reject("jobs: rows " + std::to_string(first) + ".." + std::to_string(first + count) + " are not in 0.." +
             std::to_string(rows));
    for (int64_t i = first; i < first + count; ++i)
      if (wanted[i] < 0 || wanted[i] >= from.rows)
        reject("tokens: " + std::to_string(wanted[i]) + " is not below " + std::to_string(from.rows));
    jobs.push_back({*expert, first, count});
  }
  const Kernels& kernels = find_isa(isa);
  const Activation function = activation_from(activation);
  nb::gil_scoped_release unlocked;
  moe(kernels, jobs, from.data, wanted, function, to);
}

constexpr double kLook = 0.05;  // seconds after which signals are looked for: a disk may never answer

// rank, ticket
using ComingTuple = std::tuple<int64_t, uint64_t>;

/// The experts that are there, then those that come with reads as these end; returns the seconds waited for them.
double run_moe_token(const std::string& isa, const std::vector<const Expert*>& experts, const MatrixTuple& x,
                     const MatrixTuple& gates, const MatrixTuple& out, const std::string& activation, Reads* reads,
                     const std::vector<ComingTuple>& coming) {
  if (experts.empty()) reject("experts: expected at least one");
  for (const Expert* expert : experts) check_prepared(expert);
  const MatrixView& gate = experts[0]->gate;
  for (const Expert* expert : experts)
    if (expert->gate.rows != gate.rows || expert->gate.cols != gate.cols) reject("experts: their shapes differ");
  const Matrix from = matrix_from(x, "x", gate.cols);
  const Matrix mass = matrix_from(gates, "gates", int64_t(experts.size()));
  if (from.rows != 1 || mass.rows != 1) reject("x: expected one token");
  float* to = output_from(out, 1, gate.cols);
  std::vector<int64_t> there;
  std::map<uint64_t, int64_t> left;
  for (const auto& [rank, ticket] : coming) {
    if (!reads || rank < 0 || rank >= int64_t(experts.size())) reject("coming: expected experts that are read");
    left[ticket] = rank;
  }
  for (int64_t rank = 0; rank < int64_t(experts.size()); ++rank)
    if (std::none_of(left.begin(), left.end(), [&](const auto& read) { return read.second == rank; }))
      there.push_back(rank);
  if (left.size() != coming.size() || there.size() + left.size() != experts.size())
    reject("coming: an expert or a read twice");
  const Kernels& kernels = find_isa(isa);
  TokenMoe token(kernels, experts, from.data, activation_from(activation));
  double waited = 0;
  while (true) {
    {
      nb::gil_scoped_release unlocked;
      if (!there.empty()) token.run(there);
      if (left.empty()) {
        token.combine(mass.data, to);
        return waited;
      }
      std::vector<uint64_t> tickets;
      for (const auto& read : left) tickets.push_back(read.first);
      const auto begun = std::chrono::steady_clock::now();
      there.clear();
      for (uint64_t ticket : reads->wait_any(tickets, kLook)) {
        there.push_back(left.at(ticket));
        left.erase(ticket);
      }
      waited += std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
    }
    if (there.empty() && PyErr_CheckSignals()) throw nb::python_error();
  }
}

void run_combine(const MatrixTuple& y, const MatrixTuple& gates, uintptr_t rows, const MatrixTuple& out) {
  const auto [gate, tokens, ranks] = gates;
  const int64_t width = std::get<2>(y);
  const Matrix from = matrix_from(y, "y", width);
  float* to = output_from(out, tokens, width);
  const auto* wanted = reinterpret_cast<const int64_t*>(rows);
  for (int64_t i = 0; i < tokens * ranks; ++i)
    if (wanted[i] >= from.rows) reject("rows: " + std::to_string(wanted[i]) + " is not below " + std::to_string(from.rows));
  nb::gil_scoped_release unlocked;
  combine(from.data, wanted, reinterpret_cast<const float*>(gate), tokens, ranks, width, to);
}

void run_norm(const std::string& isa, const MatrixTuple& x, uintptr_t weight, float eps, const MatrixTuple& out) {
  const auto [address, tokens, n] = x;
  float* to = output_from(out, tokens, n);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  norms(kernels, reinterpret_cast<const float*>(address), reinterpret_cast<const float*>(weight), tokens, n, eps, to);
}

/// x [tokens, heads * n], cosines [tokens, n]; sines likewise.
void run_rotate(const MatrixTuple& x, const MatrixTuple& cosines, uintptr_t sines) {
  const auto [address, tokens, width] = x;
  const auto [cosine, rows, n] = cosines;
  if (rows != tokens || n < 2 || n % 2 || width % n) reject("rotate: the table does not fit the heads");
  nb::gil_scoped_release unlocked;
  rotate(reinterpret_cast<float*>(address), tokens, width / n, n, reinterpret_cast<const float*>(cosine),
         reinterpret_cast<const float*>(sines));
}

/// y = x . weight^T; the weight [.., cols] at an address, floats or bf16.
void run_matmul(const std::string& isa, const MatrixTuple& x, uintptr_t weight, bool narrow, const MatrixTuple& y) {
  const auto [address, tokens, cols] = x;
  const int64_t rows = std::get<2>(y);
  float* to = output_from(y, tokens, rows);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  matmul(kernels, reinterpret_cast<const void*>(weight), narrow, rows, cols, reinterpret_cast<const float*>(address),
         tokens, to);
}

/// hidden = act(hidden) * ups.
void run_activate(const std::string& isa, const MatrixTuple& hidden, uintptr_t ups, const std::string& activation) {
  const auto [address, rows, cols] = hidden;
  const Kernels& kernels = find_isa(isa);
  const Activation function = activation_from(activation);
  nb::gil_scoped_release unlocked;
  activate(kernels, function, rows * cols, reinterpret_cast<const float*>(ups), reinterpret_cast<float*>(address));
}

/// Of logits [tokens, count], which are used up; experts and gates [tokens, top_k].
void run_choose(const std::string& isa, const MatrixTuple& logits, bool norm_topk, uintptr_t experts,
                const MatrixTuple& gates) {
  const auto [address, tokens, count] = logits;
  const int64_t top_k = std::get<2>(gates);
  if (top_k < 1 || top_k > count) reject("gates: expected 1.." + std::to_string(count) + " columns");
  float* to = output_from(gates, tokens, top_k);
  const Kernels& kernels = find_isa(isa);
  nb::gil_scoped_release unlocked;
  for (int64_t t = 0; t < tokens; ++t)
    choose(kernels, reinterpret_cast<float*>(address) + t * count, count, top_k, norm_topk,
           reinterpret_cast<int64_t*>(experts) + t * top_k, to + t * top_k);
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
               const VectorTuple& ids, const MatrixTuple& y) {
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

/// A layer as a decoded token goes through it. step.py has checked the shapes.
struct DecodeLayer {
  const Kernels* kernels;
  LayerWeights weights;
};

DecodeLayer make_decode_layer(const std::string& isa, const std::tuple<int64_t, int64_t, int64_t, int64_t>& heads,
                              int64_t window, const std::tuple<int64_t, int64_t, bool>& routing, float eps, float clip,
                              const std::string& qk_norm, const std::vector<uintptr_t>& vectors, uintptr_t router,
                              const std::vector<LinearTuple>& matrices) {
  if (vectors.size() != 4 || matrices.size() != 4) reject("a layer has four vectors and four matrices");
  LayerWeights w{};
  std::tie(w.hidden, w.heads, w.kv_heads, w.head_dim) = heads;
  std::tie(w.experts, w.top_k, w.norm_topk) = routing;
  if (w.heads < 1 || w.kv_heads < 1 || w.heads % w.kv_heads || w.head_dim < 2 || w.head_dim % 2 || w.top_k > w.experts)
    reject("heads and experts do not fit");
  w.window = window, w.eps = eps, w.clip = clip, w.qk_norm = qk_norm_from(qk_norm);
  const float** norms[] = {&w.attn_norm, &w.q_norm, &w.k_norm, &w.mlp_norm};
  Linear* linears[] = {&w.q, &w.k, &w.v, &w.o};
  for (int i = 0; i < 4; ++i) {
    *norms[i] = reinterpret_cast<const float*>(vectors[i]);
    *linears[i] = linear_from(matrices[i]);
  }
  w.router = reinterpret_cast<const float*>(router);
  const auto fits = [](const Linear& m, int64_t rows, int64_t cols) { return m.weight.rows == rows && m.weight.cols == cols; };
  const int64_t queries = w.heads * w.head_dim, keys = w.kv_heads * w.head_dim;
  if (!fits(w.q, queries, w.hidden) || !fits(w.k, keys, w.hidden) || !fits(w.v, keys, w.hidden) ||
      !fits(w.o, w.hidden, queries))
    reject("the shapes of the attention's matrices do not match");
  return {&find_isa(isa), w};
}

/// The layers of a model, and the cache of the sequence that tokens are decoded of.
struct DecodeStack {
  const Kernels* kernels;
  Activation activation;
  std::vector<LayerWeights> layers;
  std::vector<LayerCache> caches;
};

DecodeStack make_decode_stack(const std::vector<const DecodeLayer*>& layers, const std::string& activation) {
  if (layers.empty()) reject("a model has at least one layer");
  DecodeStack stack{layers[0]->kernels, activation_from(activation), {}, {}};
  for (const DecodeLayer* layer : layers) {
    if (layer->weights.hidden != layers[0]->weights.hidden) reject("layers: their shapes differ");
    stack.layers.push_back(layer->weights);
  }
  return stack;
}

void keep_caches(DecodeStack& stack, const std::vector<CacheTuple>& caches) {
  if (caches.size() != stack.layers.size()) reject("a cache has its rows for each layer");
  stack.caches.clear();
  for (const CacheTuple& cache : caches) stack.caches.push_back(cache_from(cache, 1));
}

// layer, experts, tiers
using UsedTuple = std::tuple<int64_t, std::vector<int64_t>, std::vector<int>>;
// layer reached; experts and gates there, none where it has no router; what was used before it
using ReachedTuple = std::tuple<int64_t, std::vector<int64_t>, std::vector<double>, std::vector<UsedTuple>>;

/// See run_layers; out and h [hidden], experts and gates [top_k]. `more`, unless it is 0, is added to x.
ReachedTuple run_stack(const DecodeStack& stack, const AtHand* at_hand, int64_t first, uintptr_t x, uintptr_t more,
                       int64_t position, uintptr_t cosines, uintptr_t sines, uintptr_t out, uintptr_t h,
                       uintptr_t experts, uintptr_t gates) {
  const int64_t count = int64_t(stack.layers.size());
  if (first < 0 || first >= count || stack.caches.empty()) reject("there is no such layer, or no cache");
  for (const LayerCache& cache : stack.caches)
    if (position < 0 || position >= cache.capacity) reject("the cache has no such position");
  const LayerWeights& some = stack.layers[0];
  for (const LayerWeights& layer : stack.layers)
    if (at_hand && layer.experts && !at_hand->fits(count, layer.experts, some.hidden))
      reject("the experts are of another model");
  const auto floats = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
  const TokenState state{floats(out), floats(h), reinterpret_cast<int64_t*>(experts), floats(gates)};
  std::vector<Used> used;
  int64_t reached = 0;
  {
    nb::gil_scoped_release unlocked;
    reached = run_layers(*stack.kernels, stack.layers, stack.caches, at_hand, stack.activation, first, floats(x),
                         floats(more), position, floats(cosines), floats(sines), state, used);
  }
  const int64_t top_k = reached < count ? stack.layers[reached].top_k : 0;
  std::vector<UsedTuple> before;
  for (Used& layer : used) before.emplace_back(layer.layer, std::move(layer.experts), std::move(layer.tiers));
  return {reached, {state.experts, state.experts + top_k}, {state.gates, state.gates + top_k}, std::move(before)};
}

/// Who puts it there keeps the expert.
void put_at_hand(AtHand& at_hand, int64_t layer, int64_t expert, int tier, const Expert* views) {
  check_prepared(views);
  at_hand.put(layer, expert, tier, views);
}

std::vector<int> tiers_at_hand(const AtHand& at_hand, int64_t layer, const std::vector<int64_t>& experts,
                               const std::vector<float>& gates) {
  if (experts.size() != gates.size()) reject("expected a gate for each expert");
  std::vector<int> tiers(experts.size());
  at_hand.tiers(layer, experts.data(), gates.data(), int64_t(experts.size()), tiers.data());
  return tiers;
}

int64_t run_receiving_parts(const std::string& isa, const std::tuple<int64_t, int64_t, int64_t, int64_t>& shape,
                            int64_t last) {
  return receiving_parts(find_isa(isa), prompt_from(shape, 0, 0, last));
}

/// vectors: queries, keys, values and out; received [receiving_parts, tokens].
void run_attend_prompt(const std::string& isa, const std::tuple<int64_t, int64_t, int64_t, int64_t>& shape,
                       int64_t start, int64_t window, int64_t last, const std::vector<uintptr_t>& vectors,
                       const CacheTuple& cache, const MatrixTuple& received) {
  const Prompt prompt = prompt_from(shape, start, window, last);
  const LayerCache rows = cache_from(cache, start + prompt.tokens);
  const Kernels& kernels = find_isa(isa);
  float* parts = output_from(received, receiving_parts(kernels, prompt), prompt.tokens);
  if (vectors.size() != 4) reject("attention: expected queries, keys, values and out");
  const auto floats = [&](int i) { return reinterpret_cast<float*>(vectors[i]); };
  nb::gil_scoped_release unlocked;
  append(kernels, prompt, floats(1), floats(2), rows);
  attend_prompt(kernels, prompt, floats(0), rows, floats(3), parts);
}

/// router and bias [experts] in place of the layer's own, unless they are 0.
void run_route(const DecodeLayer& layer, uintptr_t x, uintptr_t h, uintptr_t experts, uintptr_t gates,
               uintptr_t router, uintptr_t bias) {
  const LayerWeights& w = layer.weights;
  if (!w.experts) reject("this layer has no router");
  const Router chosen{router ? reinterpret_cast<const float*>(router) : w.router, reinterpret_cast<const float*>(bias)};
  nb::gil_scoped_release unlocked;
  route(*layer.kernels, w, chosen, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(h),
        reinterpret_cast<int64_t*>(experts), reinterpret_cast<float*>(gates));
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

uint64_t run_read_memory(const VectorTuple& data) {
  const auto [address, nbytes] = data;
  nb::gil_scoped_release unlocked;
  return read_memory(reinterpret_cast<const uint8_t*>(address), nbytes);
}

/// A function of Python's as a thread calls it that has no GIL.
std::function<void()> callback(nb::object function) {
  if (function.is_none()) return {};
  std::shared_ptr<nb::object> held(new nb::object(std::move(function)), [](nb::object* last) {
    nb::gil_scoped_acquire locked;
    delete last;
  });
  return [held] {
    nb::gil_scoped_acquire locked;
    try {
      (*held)();
    } catch (nb::python_error& error) {
      error.discard_as_unraisable("the end of a read");
    }
  };
}

void check_urgency(int urgency) {
  if (urgency < 0 || urgency >= kUrgencies) reject("urgency: expected 0.." + std::to_string(kUrgencies - 1));
}

void make_reads(Reads* reads, int threads) {
  if (threads < 1) reject("threads: expected at least one");
  new (reads) Reads(threads);
}

uint64_t submit_read(Reads& reads, int fd, int64_t offset, const SegmentTuples& tuples, int urgency, nb::object then) {
  check_urgency(urgency);
  std::vector<Span> spans;
  for (const auto& [address, nbytes] : tuples) {
    if (nbytes < 0) reject("places: expected no fewer than 0 bytes");
    spans.push_back({reinterpret_cast<uint8_t*>(address), nbytes});
  }
  return reads.submit(fd, offset, std::move(spans), urgency, callback(std::move(then)));
}

bool hurry_read(Reads& reads, uint64_t ticket, int now, int urgency) {
  check_urgency(now), check_urgency(urgency);
  return reads.hurry(ticket, now, urgency);
}

bool cancel_read(Reads& reads, uint64_t ticket, int urgency) {
  check_urgency(urgency);
  return reads.cancel(ticket, urgency);
}

std::vector<std::tuple<uint64_t, int, int64_t, double>> finished_reads(Reads& reads) {
  std::vector<std::tuple<uint64_t, int, int64_t, double>> tuples;
  for (const Outcome& o : reads.finished()) tuples.emplace_back(o.ticket, o.error, o.done, o.seconds);
  return tuples;
}

void wait_for_read(Reads& reads, uint64_t ticket) {
  while (true) {
    {
      nb::gil_scoped_release unlocked;
      if (reads.wait(ticket, kLook)) return;
    }
    if (PyErr_CheckSignals()) throw nb::python_error();
  }
}

bool close_reads(Reads& reads, double patience_s) {
  bool ended = false, interrupted = false;
  do {
    {
      nb::gil_scoped_release unlocked;
      ended = reads.stop(std::min(patience_s, kLook));
    }
    interrupted = PyErr_CheckSignals();
    patience_s -= kLook;
  } while (!ended && !interrupted && patience_s > 0);
  reads.abandon();
  if (interrupted) throw nb::python_error();
  return ended;
}

/// Address, rows and columns of a contiguous array [rows, cols] of float32; None if it is anything else.
nb::object matrix_at(nb::handle array) {
  Py_buffer view;
  if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)) {
    PyErr_Clear();
    return nb::none();
  }
  nb::object found = nb::none();
  if (view.ndim == 2 && view.itemsize == sizeof(float) && view.format && !std::strcmp(view.format, "f"))
    found = nb::make_tuple(reinterpret_cast<uintptr_t>(view.buf), view.shape[0], view.shape[1]);
  PyBuffer_Release(&view);
  return found;
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
  nb::set_leak_warnings(false);  // for who ends a program without closing a model
  nb::class_<Expert>(m, "Expert");
  nb::class_<Plan>(m, "Plan")
      .def_static("make", &make_plan, "matrices"_a)
      .def("expert", &make_expert, "tier"_a, "segments"_a)
      .def("linear", &run_linear, "isa"_a, "tier"_a, "segments"_a, "x"_a, "y"_a)
      .def("embed", &run_embed, "isa"_a, "tier"_a, "segments"_a, "ids"_a, "y"_a)
      .def("dequantize", &run_dequantize, "isa"_a, "tier"_a, "segments"_a, "name"_a, "y"_a);
  nb::class_<DecodeLayer>(m, "DecodeLayer")
      .def_static("make", &make_decode_layer, "isa"_a, "heads"_a, "window"_a, "routing"_a, "eps"_a, "clip"_a,
                  "qk_norm"_a, "vectors"_a, "router"_a, "matrices"_a)
      .def("route", &run_route, "x"_a, "h"_a, "experts"_a, "gates"_a, "router"_a = 0, "bias"_a = 0);
  nb::class_<AtHand>(m, "AtHand")
      .def(nb::init<int64_t, int64_t, std::vector<int>>(), "layers"_a, "experts"_a, "ladder"_a)
      .def("put", &put_at_hand, "layer"_a, "expert"_a, "tier"_a, "views"_a)
      .def("remove", &AtHand::remove, "layer"_a, "expert"_a, "tier"_a)
      .def("rule", &AtHand::rule, "layer"_a, "thresholds"_a, "pinned"_a)
      .def("tiers", &tiers_at_hand, "layer"_a, "experts"_a, "gates"_a);
  nb::class_<DecodeStack>(m, "DecodeStack")
      .def_static("make", &make_decode_stack, "layers"_a, "activation"_a)
      .def("keep", &keep_caches, "caches"_a)
      .def("run", &run_stack, "at_hand"_a.none(), "first"_a, "x"_a, "more"_a, "position"_a, "cosines"_a, "sines"_a,
           "out"_a, "h"_a, "experts"_a, "gates"_a);
  nb::class_<Reads>(m, "Reads")
      .def("__init__", &make_reads, "threads"_a)
      .def("submit", &submit_read, "fd"_a, "offset"_a, "places"_a, "urgency"_a, "then"_a.none())
      .def("hurry", &hurry_read, "ticket"_a, "now"_a, "urgency"_a)
      .def("cancel", &cancel_read, "ticket"_a, "urgency"_a)
      .def("started", &Reads::started)
      .def("finished", &finished_reads)
      .def("pending", &Reads::pending)
      .def("wait", &wait_for_read, "ticket"_a)
      .def("close", &close_reads, "patience_s"_a);
  m.def("moe", &run_moe, "isa"_a, "jobs"_a, "x"_a, "tokens"_a, "y"_a, "activation"_a);
  m.def("moe_token", &run_moe_token, "isa"_a, "experts"_a, "x"_a, "gates"_a, "out"_a, "activation"_a,
        "reads"_a.none() = nb::none(), "coming"_a = std::vector<ComingTuple>());
  m.def("combine", &run_combine, "y"_a, "gates"_a, "rows"_a, "out"_a);
  m.def("matmul", &run_matmul, "isa"_a, "x"_a, "weight"_a, "narrow"_a, "y"_a);
  m.def("activate", &run_activate, "isa"_a, "hidden"_a, "ups"_a, "activation"_a);
  m.def("choose", &run_choose, "isa"_a, "logits"_a, "norm_topk"_a, "experts"_a, "gates"_a);
  m.def("norm", &run_norm, "isa"_a, "x"_a, "weight"_a, "eps"_a, "out"_a);
  m.def("rotate", &run_rotate, "x"_a, "cosines"_a, "sines"_a);
  m.def("receiving_parts", &run_receiving_parts, "isa"_a, "shape"_a, "last"_a);
  m.def("attend_prompt", &run_attend_prompt, "isa"_a, "shape"_a, "start"_a, "window"_a, "last"_a, "vectors"_a,
        "cache"_a, "received"_a);
  m.def("descend", &run_descend, "isa"_a, "bits"_a, "weights"_a, "hessian"_a, "hessian_pitch"_a, "slope"_a, "units"_a,
        "scales"_a, "error"_a, "codes"_a, "pitch"_a, "last"_a);
  m.def("fit", &run_fit, "isa"_a, "bits"_a, "weights"_a, "weight"_a, "importance"_a, "starts"_a, "start"_a, "scales"_a,
        "codes"_a);
  m.def("matrix_at", &matrix_at, "array"_a);
  m.def("available_isas", &isa_names);
  m.def("read_memory", &run_read_memory, "data"_a);
  m.def("threads", &threads);
  m.def("set_threads", &set_threads, "count"_a);
  m.def("pin_threads", &pin_threads, "pinned"_a);
}

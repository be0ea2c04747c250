// What a decoded token goes through, for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <map>

#include "arguments.h"
#include "binding.h"
#include "isa.h"
#include "reads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dymoe {
namespace {

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

/// A layer as a decoded token goes through it. dense.py has checked the shapes of vectors and router, which are addresses.
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

}  // namespace

void bind_decode(nb::module_& m) {
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
  m.def("moe_token", &run_moe_token, "isa"_a, "experts"_a, "x"_a, "gates"_a, "out"_a, "activation"_a,
        "reads"_a.none() = nb::none(), "coming"_a = std::vector<ComingTuple>());
}

}  // namespace dymoe

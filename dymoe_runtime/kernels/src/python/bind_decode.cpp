// Python bindings of what runs a decoded token.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "decode/stack.h"
#include "decode/token.h"
#include "isa/isa.h"
#include "python/arguments.h"
#include "python/bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dymoe {
namespace {

// index of the expert, ticket of its read
using PendingTuple = std::tuple<int64_t, uint64_t>;

double run_moe_token(const std::string& isa, const std::vector<const Expert*>& pointers, const MatrixTuple& x,
                     const MatrixTuple& weights, const MatrixTuple& out, const std::string& activation,
                     ReadThreads* reads, const std::vector<PendingTuple>& tuples) {
  if (pointers.empty()) reject("experts: expected at least one");
  for (const Expert* expert : pointers) prepared(expert);
  const int64_t hidden = pointers[0]->gate.cols;
  const Matrix from = matrix_from(x, "x", hidden);
  const Matrix mass = matrix_from(weights, "weights", int64_t(pointers.size()));
  if (from.rows != 1 || mass.rows != 1) reject("x: expected one token");
  float* to = output_from(out, 1, hidden);
  std::vector<PendingExpert> pending;
  for (const auto& [rank, ticket] : tuples) pending.push_back({rank, ticket});
  const Kernels& kernels = find_isa(isa);
  const Activation function = activation_from(activation);
  try {
    nb::gil_scoped_release unlocked;
    return run_token(kernels, pointers, from.data, mass.data, function, reads, pending, signal_pending, to);
  } catch (const Interrupted&) {
    throw nb::python_error();
  }
}

/// The dense weights of a layer, for one instruction set.
struct DecodeLayer {
  const Kernels* kernels;
  LayerWeights weights;
};

// experts, top_k, normalize
using RoutingTuple = std::tuple<int64_t, int64_t, bool>;
// hidden, heads, kv_heads, head_dim
using HeadsTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;

/// vectors are the addresses of attn_norm, q_norm, k_norm and mlp_norm, 0 for none; matrices are q, k, v and o.
DecodeLayer make_layer(const std::string& isa, const HeadsTuple& heads, int64_t window, const RoutingTuple& routing,
                       float eps, float clip, const std::string& qk_norm, const std::vector<uintptr_t>& vectors,
                       uintptr_t router, const std::vector<LinearTuple>& matrices) {
  if (vectors.size() != 4 || matrices.size() != 4) reject("a layer has four vectors and four matrices");
  LayerWeights w{};
  std::tie(w.hidden, w.heads, w.kv_heads, w.head_dim) = heads;
  std::tie(w.experts, w.top_k, w.normalize) = routing;
  w.window = window, w.eps = eps, w.clip = clip, w.qk_norm = qk_norm_from(qk_norm);
  const float** norms[] = {&w.attn_norm, &w.q_norm, &w.k_norm, &w.mlp_norm};
  Linear* linears[] = {&w.q, &w.k, &w.v, &w.o};
  for (int i = 0; i < 4; ++i) {
    *norms[i] = reinterpret_cast<const float*>(vectors[i]);
    *linears[i] = linear_from(matrices[i]);
  }
  w.router = {reinterpret_cast<const float*>(router), nullptr};
  check(w);
  return {&find_isa(isa), w};
}

/// A layer is None if the caller runs it.
void make_stack(DecodeStack* stack, const std::string& isa, const nb::list& layers, const std::string& activation) {
  std::vector<std::optional<LayerWeights>> known;
  for (nb::handle layer : layers) {
    known.emplace_back();
    if (!layer.is_none()) known.back() = nb::cast<const DecodeLayer&>(layer).weights;
  }
  new (stack) DecodeStack(find_isa(isa), std::move(known), activation_from(activation));
}

/// The cache of a layer that the caller runs has capacity 0.
void set_caches(DecodeStack& stack, const std::vector<CacheTuple>& tuples) {
  std::vector<LayerCache> caches;
  for (const CacheTuple& tuple : tuples)
    caches.push_back(std::get<2>(tuple) ? cache_from(tuple, 1) : LayerCache{nullptr, nullptr, 0, 16});
  stack.set_caches(std::move(caches));
}

// addresses of the residual stream and its norm [hidden], and of experts and weights [top_k]
using BuffersTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

TokenBuffers buffers_from(const BuffersTuple& tuple) {
  const auto [residual, h, experts, weights] = tuple;
  return {reinterpret_cast<float*>(residual), reinterpret_cast<float*>(h), reinterpret_cast<int64_t*>(experts),
          reinterpret_cast<float*>(weights)};
}

// layer, experts, tiers
using UseTuple = std::tuple<int64_t, std::vector<int64_t>, std::vector<int>>;
// layer reached, whether its attention has run, experts and weights that its router chose, uses of the layers before
using ReachedTuple = std::tuple<int64_t, bool, std::vector<int64_t>, std::vector<double>, std::vector<UseTuple>>;

/// `more` may be 0; position is (index, address of its cosines, address of its sines).
ReachedTuple run_stack(const DecodeStack& stack, const ResidentTable* table, int64_t first, uintptr_t x, uintptr_t more,
                       const std::tuple<int64_t, uintptr_t, uintptr_t>& position, const BuffersTuple& buffers) {
  const auto [index, cosines, sines] = position;
  const Position where{index, reinterpret_cast<const float*>(cosines), reinterpret_cast<const float*>(sines)};
  const TokenBuffers token = buffers_from(buffers);
  Reached reached;
  {
    nb::gil_scoped_release unlocked;
    reached =
        stack.run(table, first, reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(more), where, token);
  }
  std::vector<UseTuple> used;
  for (LayerUse& use : reached.used) used.emplace_back(use.layer, std::move(use.experts), std::move(use.tiers));
  return {reached.layer,
          reached.attended,
          {token.experts, token.experts + reached.chosen},
          {token.weights, token.weights + reached.chosen},
          std::move(used)};
}

/// x and h are [hidden]. Unless it is 0, router [experts, hidden] replaces the layer's own, with bias [experts] or 0.
void route_stack(const DecodeStack& stack, int64_t layer, uintptr_t x, uintptr_t h, uintptr_t experts,
                 uintptr_t weights, uintptr_t router, uintptr_t bias) {
  const Router other{reinterpret_cast<const float*>(router), reinterpret_cast<const float*>(bias)};
  nb::gil_scoped_release unlocked;
  stack.route(layer, router ? &other : nullptr, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(h),
              reinterpret_cast<int64_t*>(experts), reinterpret_cast<float*>(weights));
}

/// The caller keeps the expert alive until it is removed.
void put_resident(ResidentTable& table, int64_t layer, int64_t expert, int tier, const Expert* views) {
  table.put(layer, expert, tier, &prepared(views));
}

std::vector<int> choose_tiers(const ResidentTable& table, int64_t layer, const std::vector<int64_t>& experts,
                              const std::vector<float>& weights) {
  if (experts.size() != weights.size()) reject("expected a weight for each expert");
  std::vector<int> tiers(experts.size());
  table.choose_tiers(layer, experts.data(), weights.data(), int64_t(experts.size()), tiers.data());
  return tiers;
}

}  // namespace

void bind_decode(nb::module_& m) {
  nb::class_<DecodeLayer>(m, "DecodeLayer")
      .def_static("make", &make_layer, "isa"_a, "heads"_a, "window"_a, "routing"_a, "eps"_a, "clip"_a, "qk_norm"_a,
                  "vectors"_a, "router"_a, "matrices"_a);
  nb::class_<ResidentTable>(m, "ResidentTable")
      .def(nb::init<int64_t, int64_t, std::vector<int>>(), "layers"_a, "experts"_a, "ladder"_a)
      .def("put", &put_resident, "layer"_a, "expert"_a, "tier"_a, "views"_a)
      .def("remove", &ResidentTable::remove, "layer"_a, "expert"_a, "tier"_a)
      .def("set_rule", &ResidentTable::set_rule, "layer"_a, "thresholds"_a, "pinned"_a)
      .def("choose_tiers", &choose_tiers, "layer"_a, "experts"_a, "weights"_a);
  nb::class_<DecodeStack>(m, "DecodeStack")
      .def("__init__", &make_stack, "isa"_a, "layers"_a, "activation"_a)
      .def("set_caches", &set_caches, "caches"_a)
      .def("run", &run_stack, "table"_a.none(), "first"_a, "x"_a, "more"_a, "position"_a, "buffers"_a)
      .def("route", &route_stack, "layer"_a, "x"_a, "h"_a, "experts"_a, "weights"_a, "router"_a = 0, "bias"_a = 0);
  m.def("moe_token", &run_moe_token, "isa"_a, "experts"_a, "x"_a, "weights"_a, "out"_a, "activation"_a,
        "reads"_a.none() = nb::none(), "pending"_a = std::vector<PendingTuple>());
}

}  // namespace dymoe

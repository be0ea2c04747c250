// Python bindings of what runs a decoded token.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <optional>
#include <variant>

#include "decode/stack.h"
#include "decode/token.h"
#include "isa/isa.h"
#include "python/arguments.h"
#include "python/bind.h"
#include "python/specs.h"

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

OutputGate gate_from(const std::string& name) {
  if (name == "none") return OutputGate::none;
  if (name == "element") return OutputGate::element;
  if (name == "head") return OutputGate::head;
  reject("gate '" + name + "': expected none, element or head");
}

/// The tensors of a layer by name. Each can be taken once; what is left over does not belong to the layer.
class Tensors {
 public:
  Tensors(std::map<std::string, MatrixTuple> plain, std::map<std::string, LinearTuple> quantized)
      : plain_(std::move(plain)), quantized_(std::move(quantized)) {}

  /// Returns a tensor that is not quantized; an empty one if there is none.
  FloatMatrix plain(const std::string& name) {
    const auto found = plain_.find(name);
    if (found == plain_.end()) return {};
    const auto [address, rows, cols] = found->second;
    plain_.erase(found);
    return {reinterpret_cast<const float*>(address), rows, cols};
  }

  /// Returns a norm with its bias, each of them empty if there is none.
  Norm norm(const std::string& name) { return {plain(name), plain(name + "_bias")}; }

  /// Returns a quantized matrix; an empty one if there is none.
  Linear linear(const std::string& name) {
    const auto found = quantized_.find(name);
    if (found == quantized_.end()) return {};
    const Linear linear = linear_from(found->second);
    quantized_.erase(found);
    return linear;
  }

  /// Returns a dense MLP whose matrices are called `prefix`gate, `prefix`up and `prefix`down.
  MlpLayer mlp(const std::string& prefix, int64_t width) {
    return {width, {linear(prefix + "gate").weight, linear(prefix + "up").weight, linear(prefix + "down").weight}};
  }

  /// Throws std::invalid_argument if a tensor has not been taken.
  void expect_none() const {
    if (!plain_.empty()) reject(plain_.begin()->first + ": the layer has no such tensor");
    if (!quantized_.empty()) reject(quantized_.begin()->first + ": the layer has no such matrix");
  }

 private:
  std::map<std::string, MatrixTuple> plain_;
  std::map<std::string, LinearTuple> quantized_;
};

// index of the rotary embedding or -1, columns of a head that turn
using RotationTuple = std::tuple<int64_t, int64_t>;

AttentionLayer attention_from(nb::handle spec, const RotationTuple& rotation, Tensors& tensors) {
  AttentionLayer w{};
  w.heads = field<int64_t>(spec, "heads"), w.kv_heads = field<int64_t>(spec, "kv_heads");
  w.head_dim = field<int64_t>(spec, "head_dim");
  w.window = field<int64_t>(spec, "window"), w.chunk = field<int64_t>(spec, "chunk");
  std::tie(w.rotation, w.turning) = rotation;
  w.qk_norm = qk_norm_from(field<std::string>(spec, "qk_norm"));
  w.output_gate = gate_from(field<std::string>(spec, "gate"));
  w.bias = field<bool>(spec, "bias"), w.output_bias = field<bool>(spec, "output_bias");
  w.norm_after_rope = field<bool>(spec, "norm_after_rope"), w.value_norm = field<bool>(spec, "value_norm");
  w.has_sinks = field<bool>(spec, "sinks");
  w.softplus = field<std::string>(spec, "gate_activation") == "softplus";
  w.clip = field<float>(spec, "clip"), w.scale = field<double>(spec, "scale");
  std::tie(w.floor, w.strength) = field<std::tuple<float, float>>(spec, "temperature");
  w.q_norm = tensors.plain("attn.q_norm"), w.k_norm = tensors.plain("attn.k_norm");
  w.v_norm = tensors.plain("attn.v_norm"), w.sinks = tensors.plain("attn.sinks");
  w.q = tensors.linear("attn.q"), w.k = tensors.linear("attn.k"), w.v = tensors.linear("attn.v");
  w.o = tensors.linear("attn.o"), w.gate = tensors.linear("attn.gate");
  return w;
}

DeltaLayer delta_from(nb::handle spec, Tensors& tensors) {
  DeltaLayer w{};
  w.shape = delta_shape_from(spec);
  w.ba = tensors.plain("delta.ba_exact"), w.conv = tensors.plain("delta.conv_exact");
  w.a_log = tensors.plain("delta.a_log"), w.dt_bias = tensors.plain("delta.dt_bias");
  w.norm = tensors.plain("delta.norm");
  w.qkv = tensors.linear("delta.qkv"), w.z = tensors.linear("delta.z"), w.o = tensors.linear("delta.o");
  return w;
}

SharedLayer shared_from(nb::handle spec, Tensors& tensors) {
  SharedLayer w{};
  w.mlp = tensors.mlp("shared.", field<int64_t>(spec, "width"));
  w.gated = field<bool>(spec, "gated"), w.own_norms = field<bool>(spec, "own_norms");
  w.scale = field<float>(spec, "scale");
  w.gate = tensors.plain("shared_gate"), w.norm = tensors.norm("shared_norm");
  w.post_norm = tensors.norm("shared_post_norm"), w.experts_post_norm = tensors.norm("experts_post_norm");
  return w;
}

MoeLayer moe_from(nb::handle spec, Tensors& tensors) {
  const nb::object router = spec.attr("router"), shared = spec.attr("shared");
  MoeLayer w{};
  w.rule = rule_from(router);
  w.bias = field<bool>(router, "bias"), w.selection_bias = field<bool>(router, "selection_bias");
  w.expert_scale = field<bool>(router, "expert_scale"), w.plain_norm = field<bool>(router, "plain_norm");
  w.scales_input = field<bool>(router, "scales_input");
  w.router = tensors.plain("router"), w.router_bias = tensors.plain("router_bias");
  w.select = tensors.plain("router_select"), w.scale = tensors.plain("router_scale");
  if (!shared.is_none()) w.shared = shared_from(shared, tensors);
  return w;
}

// kind of all norms, one of NORMS in spec.py; their epsilon
using NormTuple = std::tuple<std::string, float>;

NormKind norm_kind_from(const std::string& name) {
  if (name == "rms") return NormKind::rms;
  if (name == "layer") return NormKind::layer;
  if (name == "layer_bias") return NormKind::layer_bias;
  reject("norm '" + name + "': expected rms, layer or layer_bias");
}

/// `layer` is a LayerSpec; tensors that are not quantized come with rows and columns.
DecodeLayer make_layer(const std::string& isa, int64_t hidden, const NormTuple& norm, nb::handle layer,
                       const RotationTuple& rotation, const std::map<std::string, MatrixTuple>& plain,
                       const std::map<std::string, LinearTuple>& quantized) {
  const nb::object mixer = layer.attr("mixer"), part = layer.attr("feed_forward");
  const auto mixer_kind = field<std::string>(mixer, "kind"), part_kind = field<std::string>(part, "kind");
  Tensors tensors(plain, quantized);
  LayerWeights w{};
  w.hidden = hidden, w.norm_kind = norm_kind_from(std::get<0>(norm)), w.eps = std::get<1>(norm);
  w.pre_norms = field<bool>(layer, "pre_norms"), w.post_norms = field<bool>(layer, "post_norms");
  w.has_scalar = field<bool>(layer, "scalar"), w.residual_scale = field<float>(layer, "residual_scale");
  w.parallel = field<bool>(layer, "parallel");
  w.attn_norm = tensors.norm("attn_norm"), w.attn_post_norm = tensors.norm("attn_post_norm");
  w.mlp_norm = tensors.norm("mlp_norm"), w.mlp_post_norm = tensors.norm("mlp_post_norm");
  w.scalar = tensors.plain("scalar");
  if (mixer_kind == "gqa") {
    w.mixer = attention_from(mixer, rotation, tensors);
  } else if (mixer_kind == "gated_delta") {
    w.mixer = delta_from(mixer, tensors);
  } else {
    reject("mixer '" + mixer_kind + "': expected gqa or gated_delta");
  }
  if (part_kind == "moe") {
    w.feed_forward = moe_from(part, tensors);
  } else {
    w.feed_forward = tensors.mlp("mlp.", field<int64_t>(part, "width"));
  }
  tensors.expect_none();
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

// addresses and lengths of the inputs of the convolution and of the memory
using DeltaTuple = std::tuple<VectorTuple, VectorTuple>;

/// A state is None if the caller runs its layer.
LayerState state_from(const std::optional<std::variant<CacheTuple, DeltaTuple>>& state) {
  if (!state) return std::monostate();
  if (const auto* cache = std::get_if<CacheTuple>(&*state)) return cache_from(*cache, 1);
  const auto [tail, memory] = std::get<DeltaTuple>(*state);
  const DeltaState arrays{reinterpret_cast<float*>(std::get<0>(tail)), reinterpret_cast<float*>(std::get<0>(memory))};
  return DeltaArrays{arrays, std::get<1>(tail), std::get<1>(memory)};
}

/// Takes the states of each sequence, by layer.
void set_states(DecodeStack& stack,
                const std::vector<std::vector<std::optional<std::variant<CacheTuple, DeltaTuple>>>>& tuples) {
  std::vector<std::vector<LayerState>> sequences;
  for (const auto& sequence : tuples) {
    sequences.emplace_back();
    for (const auto& tuple : sequence) sequences.back().push_back(state_from(tuple));
  }
  stack.set_states(std::move(sequences));
}

// addresses of the residual streams and of what experts read [tokens, hidden], and of experts and weights
// [tokens, top_k]
using BuffersTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

TokenBuffers buffers_from(const BuffersTuple& tuple) {
  const auto [residual, h, experts, weights] = tuple;
  return {reinterpret_cast<float*>(residual), reinterpret_cast<float*>(h), reinterpret_cast<int64_t*>(experts),
          reinterpret_cast<float*>(weights)};
}

// layer, experts, tiers
using UseTuple = std::tuple<int64_t, std::vector<int64_t>, std::vector<int>>;
// layer reached, whether its mixer has run, how many experts its router chose, uses of the layers before
using ReachedTuple = std::tuple<int64_t, bool, int64_t, std::vector<UseTuple>>;

// index of the token, addresses of cosines and sines for each rotary embedding
using PositionTuple = std::tuple<int64_t, std::vector<std::tuple<uintptr_t, uintptr_t>>>;

Position position_from(const PositionTuple& tuple) {
  Position position{std::get<0>(tuple), {}};
  for (const auto& [cosines, sines] : std::get<1>(tuple))
    position.rotations.push_back({reinterpret_cast<const float*>(cosines), reinterpret_cast<const float*>(sines)});
  return position;
}

/// Each sequence has a position; `more` may be 0.
ReachedTuple run_stack(const DecodeStack& stack, const ResidentTable* table, int64_t first, uintptr_t x, uintptr_t more,
                       const std::vector<PositionTuple>& tuples, const BuffersTuple& buffers) {
  std::vector<Position> positions;
  for (const PositionTuple& tuple : tuples) positions.push_back(position_from(tuple));
  const TokenBuffers tokens = buffers_from(buffers);
  Reached reached;
  {
    nb::gil_scoped_release unlocked;
    reached = stack.run(table, first, reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(more),
                        positions, tokens);
  }
  std::vector<UseTuple> used;
  for (LayerUse& use : reached.used) used.emplace_back(use.layer, std::move(use.experts), std::move(use.tiers));
  return {reached.layer, reached.attended, reached.chosen, std::move(used)};
}

/// x is [hidden]. Unless it is 0, router [experts, hidden] replaces the layer's own, with bias [experts] or 0.
void route_stack(const DecodeStack& stack, int64_t layer, uintptr_t x, uintptr_t experts, uintptr_t weights,
                 uintptr_t router, uintptr_t bias) {
  const Router other{reinterpret_cast<const float*>(router), reinterpret_cast<const float*>(bias)};
  nb::gil_scoped_release unlocked;
  stack.route(layer, router ? &other : nullptr, reinterpret_cast<const float*>(x), reinterpret_cast<int64_t*>(experts),
              reinterpret_cast<float*>(weights));
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
      .def_static("make", &make_layer, "isa"_a, "hidden"_a, "norm"_a, "layer"_a, "rotation"_a, "plain"_a,
                  "quantized"_a);
  nb::class_<ResidentTable>(m, "ResidentTable")
      .def(nb::init<int64_t, int64_t, std::vector<int>>(), "layers"_a, "experts"_a, "ladder"_a)
      .def("put", &put_resident, "layer"_a, "expert"_a, "tier"_a, "views"_a)
      .def("remove", &ResidentTable::remove, "layer"_a, "expert"_a, "tier"_a)
      .def("set_rule", &ResidentTable::set_rule, "layer"_a, "thresholds"_a, "pinned"_a)
      .def("choose_tiers", &choose_tiers, "layer"_a, "experts"_a, "weights"_a);
  nb::class_<DecodeStack>(m, "DecodeStack")
      .def("__init__", &make_stack, "isa"_a, "layers"_a, "activation"_a)
      .def("set_states", &set_states, "sequences"_a)
      .def("run", &run_stack, "table"_a.none(), "first"_a, "x"_a, "more"_a, "positions"_a, "buffers"_a)
      .def("route", &route_stack, "layer"_a, "x"_a, "experts"_a, "weights"_a, "router"_a = 0, "bias"_a = 0);
  m.def("moe_token", &run_moe_token, "isa"_a, "experts"_a, "x"_a, "weights"_a, "out"_a, "activation"_a,
        "reads"_a.none() = nb::none(), "pending"_a = std::vector<PendingTuple>());
}

}  // namespace dymoe

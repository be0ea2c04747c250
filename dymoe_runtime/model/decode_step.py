"""Decoding through compiled layers: one token of each of some sequences.

`Decoder` and `StoredExperts` compute the same results and are the reference. Compiled layers are faster at one token,
because there NumPy and Python spend more time on the overhead of most operations than on the operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.kernels.interface import ExpertTable, Kernels, LayerStack, Position
from dymoe_runtime.kernels.kv_cache import KVCache
from dymoe_runtime.kernels.prepared import DecodeWeights, DeltaArrays, LinearWeights
from dymoe_runtime.memory import address_of
from dymoe_runtime.model.mixer import LayerState
from dymoe_runtime.model.mixers.gated_delta import DeltaState
from dymoe_runtime.model.mixers.gqa import AttentionState
from dymoe_runtime.model.rope import rotary
from dymoe_runtime.model.routing import Routing
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import AttentionSpec, GatedDeltaSpec, ModelSpec, Rope, is_exact


class StoredDense(Protocol):
    """Dense weights as a bundle stores them."""

    def record(self, name: str) -> tuple[RecordLayout, np.ndarray] | None:
        """Return the layout and the bytes of a quantized matrix, or None if `name` is not one."""

    def optional(self, name: str) -> np.ndarray | None:
        """Return a tensor that is not quantized, or None if the model has none called `name`."""


class DirectExperts(Protocol):
    """Resident experts that compiled code may use without a lease."""

    def table(self) -> ExpertTable | None:
        """Return the table of resident experts, or None if all experts must be requested now."""

    def used(self, uses: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> None:
        """Record the (layer, experts, tiers) that a token used in some layers; tier 0 is a skipped expert."""


class CompiledLayers:
    """The layers that compiled code can run outside their routed experts, and guesses of their routing."""

    def __init__(self, stack: LayerStack, dense: StoredDense, predictors: Mapping[int, np.ndarray]) -> None:
        """Keep `dense` alive, whose memory `stack` uses; `predictors` maps layers to those of `Routers.guess`."""
        self.stack = stack
        self._dense = dense
        self._states: Sequence[SequenceState] = ()  # whose arrays the stack has
        for layer, predictor in predictors.items():
            if stack.knows(layer):
                stack.set_guesser(layer, *self._guesser(layer, predictor))

    @staticmethod
    def make(
        spec: ModelSpec, dense: StoredDense, kernels: Kernels, predictors: Mapping[int, np.ndarray] | None = None
    ) -> CompiledLayers | None:
        """Return the compiled layers of a model, or None if these kernels cannot run any of its layers."""
        layers = [decode_weights(spec, dense, layer) for layer in range(spec.num_layers)]
        if not any(layers):
            return None
        stack = kernels.decode_stack(layers, spec.activation)
        return None if stack is None else CompiledLayers(stack, dense, predictors or {})

    def use_states(self, states: Sequence[SequenceState]) -> None:
        """Let the stack continue the sequences of `states`, and keep the arrays that it points to alive."""
        if states is not self._states:
            self.stack.set_states([[_arrays(of_layer) for of_layer in state.layers] for state in states])
            self._states = states

    def knows(self, layer: int) -> bool:
        """Return whether compiled code runs `layer` and the layer has a router."""
        return self.stack.knows(layer)

    def guess(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the experts and routing weights [1, k] that `layer` would choose for a residual stream x [1, H]."""
        return self.stack.guess(layer, x)

    def _guesser(self, layer: int, predictor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the router of `layer` plus the predictor, [experts, H], and the sum of their biases, [experts]."""
        router, bias = (self._dense.optional(f"layers.{layer}.{name}") for name in ("router", "router_bias"))
        assert router is not None and predictor.shape == (router.shape[0], router.shape[1] + 1)
        return router + predictor[:, :-1], predictor[:, -1] + (np.float32(0) if bias is None else bias)


class DecodeStep:
    """A `Step` that runs tokens through `layers`, and through `direct` experts while they are resident.

    The arrays that `run` returns are valid until its next call.
    """

    def __init__(self, spec: ModelSpec, layers: CompiledLayers, direct: DirectExperts | None = None) -> None:
        self._layers, self._stack = layers, layers.stack
        self._direct = direct
        self._rotaries = [rotary(rope, head_dim) for rope, head_dim in rotations_of(spec)]
        self._states: Sequence[SequenceState] = ()  # of the current tokens
        self._lengths: list[int] = []  # of these
        self._tables: list[list[tuple[np.ndarray, np.ndarray]]] = []  # cosines and sines of their next positions
        self._positions: list[Position] = []

    def run(
        self, layer: int, x: np.ndarray, more: np.ndarray | None, states: Sequence[SequenceState]
    ) -> tuple[int, np.ndarray, bool, tuple[np.ndarray, Routing] | None]:
        stack = self._stack
        self._find_positions(states)
        self._layers.use_states(states)
        table = None if self._direct is None else self._direct.table()
        layer, attended, chosen, used = stack.run(table, layer, x, more, self._positions)
        if used and self._direct is not None:
            self._direct.used(used)
        if not chosen:
            return layer, stack.residual, attended, None
        return layer, stack.residual, attended, (stack.h, self._routing(chosen))

    def _find_positions(self, states: Sequence[SequenceState]) -> None:
        """Find the positions of the next tokens of `states`, unless they are known."""
        lengths = [state.length for state in states]
        if states is self._states and lengths == self._lengths:
            return
        self._tables = [[each.table(s.length, s.length + 1, s.capacity) for each in self._rotaries] for s in states]
        addresses = ([(address_of(cosines), address_of(sines)) for cosines, sines in each] for each in self._tables)
        self._positions = list(zip(lengths, addresses, strict=True))
        self._states, self._lengths = states, lengths

    def _routing(self, chosen: int) -> Routing:
        """Return the routing of the layer at which the stack has stopped, whose router chooses `chosen` experts."""
        stack = self._stack
        tokens, size = len(stack.residual), len(stack.residual) * chosen
        # The router of another layer may choose more.
        experts, weights = (of.reshape(-1)[:size].reshape(tokens, chosen) for of in (stack.experts, stack.weights))
        listed = (experts[0].tolist(), weights[0].tolist()) if tokens == 1 else None
        return Routing(experts, weights, stack.residual, listed)


def rotations_of(spec: ModelSpec) -> list[tuple[Rope, int]]:
    """Return each rotary embedding of a model once, with the columns of its heads."""
    mixers = (layer.mixer for layer in spec.layers if isinstance(layer.mixer, AttentionSpec))
    return list(dict.fromkeys((mixer.rope, mixer.head_dim) for mixer in mixers if mixer.rope is not None))


def decode_weights(spec: ModelSpec, dense: StoredDense, layer: int) -> DecodeWeights | None:
    """Return the weights of a layer for compiled code.

    Returns None if compiled code does not know its mixer, or if one of its matrices is not quantized.
    """
    known = spec.layers[layer]
    if not isinstance(known.mixer, AttentionSpec | GatedDeltaSpec):
        return None
    tensors = _tensors(dense, f"layers.{layer}.", _shapes_by_layer(spec)[layer])
    if tensors is None:
        return None
    rotation = -1
    if isinstance(known.mixer, AttentionSpec) and known.mixer.rope is not None:
        rotation = rotations_of(spec).index((known.mixer.rope, known.mixer.head_dim))
    return DecodeWeights(spec.hidden_size, spec.norm, spec.norm_eps, known, rotation, *tensors)


@lru_cache(maxsize=1)
def _shapes_by_layer(spec: ModelSpec) -> Sequence[Mapping[str, tuple[int, ...]]]:
    """Return the shapes of each layer's tensors, by their names in the layer."""
    shapes = [dict[str, tuple[int, ...]]() for _ in spec.layers]
    for name, shape in spec.each_tensor():
        if name.startswith("layers."):
            _, layer, own_name = name.split(".", 2)
            shapes[int(layer)][own_name] = shape
    return shapes


def _tensors(
    dense: StoredDense, prefix: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], dict[str, LinearWeights]] | None:
    """Return the tensors of a layer that are not quantized, and its quantized matrices with their biases.

    Returns None if a matrix has more bits than compiled code can run.
    """
    plain, quantized = {}, {}
    for name, shape in shapes.items():
        if (record := dense.record(prefix + name)) is not None:
            quantized[name] = LinearWeights(*record, dense.optional(f"{prefix}{name}_bias"))
        elif len(shape) == 2 and not is_exact(prefix + name):
            return None
        elif name.removesuffix("_bias") not in quantized:
            tensor = dense.optional(prefix + name)
            assert tensor is not None
            plain[name] = tensor
    return plain, quantized


def _arrays(state: LayerState) -> KVCache | DeltaArrays | None:
    """Return the arrays of a layer's state, or None if compiled code does not know them."""
    if isinstance(state, AttentionState):
        return state.cache
    return state.arrays if isinstance(state, DeltaState) else None

"""Decoding of one token through compiled layers.

`Decoder` and `StoredExperts` compute the same results and are the reference. Compiled layers are faster at one token,
because there NumPy and Python spend more time on the overhead of most operations than on the operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.kernels.interface import ExpertTable, Kernels, LayerStack
from dymoe_runtime.kernels.prepared import DecodeWeights, LinearWeights
from dymoe_runtime.memory import address_of
from dymoe_runtime.model.mixers.gqa import AttentionState
from dymoe_runtime.model.rope import rotary
from dymoe_runtime.model.routing import Routing
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import AttentionSpec, ModelSpec, MoeSpec


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
    """The dense halves of the layers that compiled code can run, and guesses of their routing."""

    def __init__(self, stack: LayerStack, dense: StoredDense, predictors: Mapping[int, np.ndarray]) -> None:
        """Keep `dense` alive, whose memory `stack` uses; `predictors` maps layers to those of `Routers.guess`."""
        self.stack = stack
        self._dense = dense
        self._state: SequenceState | None = None  # whose caches the stack has
        for layer, predictor in predictors.items():
            stack.set_guesser(layer, *self._guesser(layer, predictor))

    @staticmethod
    def make(
        spec: ModelSpec, dense: StoredDense, kernels: Kernels, predictors: Mapping[int, np.ndarray] | None = None
    ) -> CompiledLayers | None:
        """Return the compiled layers of a model, or None if these kernels cannot run any of its layers.

        Returns None too if the layers have more than one rotary embedding.
        """
        layers = [decode_weights(spec, dense, layer) for layer in range(spec.num_layers)]
        rotations = {(layer.attention.rope, layer.attention.head_dim) for layer in layers if layer is not None}
        if len(rotations) != 1:  # the stack takes one table of cosines and sines for all layers
            return None
        stack = kernels.decode_stack(layers, spec.activation)
        return None if stack is None else CompiledLayers(stack, dense, predictors or {})

    def use_state(self, state: SequenceState) -> None:
        """Let the stack continue the sequence of `state`, and keep the caches that it points to alive."""
        if state is not self._state:
            self.stack.set_caches([s.cache if isinstance(s, AttentionState) else None for s in state.layers])
            self._state = state

    def knows(self, layer: int) -> bool:
        """Return whether compiled code runs `layer` and the layer has a router."""
        return self.stack.knows(layer)

    def guess(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the experts and routing weights [1, k] that `layer` would choose for a residual stream x [1, H]."""
        return self.stack.guess(layer, x)

    def _guesser(self, layer: int, predictor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the router of `layer` plus the predictor, [experts, H], and the predictor's bias, [experts]."""
        router = self._dense.optional(f"layers.{layer}.router")
        assert router is not None and predictor.shape == (router.shape[0], router.shape[1] + 1)
        return router + predictor[:, :-1], predictor[:, -1].copy()


class DecodeStep:
    """A `Step` that runs one token through `layers`, and through `direct` experts while they are resident.

    The arrays that `run` returns are valid until its next call.
    """

    def __init__(self, spec: ModelSpec, layers: CompiledLayers, direct: DirectExperts | None = None) -> None:
        self._layers, self._stack = layers, layers.stack
        self._direct = direct
        attention = next(layer.mixer for layer in spec.layers if isinstance(layer.mixer, AttentionSpec))
        self._rotary = rotary(attention.rope, attention.head_dim)
        self._tables: tuple[np.ndarray, ...] = ()  # cosines and sines of the current position
        self._position = (-1, 0, 0)  # position, addresses of its cosines and sines

    def run(
        self, layer: int, x: np.ndarray, more: np.ndarray | None, state: SequenceState
    ) -> tuple[int, np.ndarray, bool, tuple[np.ndarray, Routing] | None]:
        at, stack = state.length, self._stack
        if at != self._position[0]:
            self._tables = cosines, sines = self._rotary.table(at, at + 1)
            self._position = at, address_of(cosines), address_of(sines)
        self._layers.use_state(state)
        table = None if self._direct is None else self._direct.table()
        layer, attended, experts, weights, used = stack.run(table, layer, x, more, self._position)
        if used and self._direct is not None:
            self._direct.used(used)
        if not experts:
            return layer, stack.residual, attended, None
        routing = Routing(stack.experts, stack.weights, stack.residual, (experts, weights))
        return layer, stack.residual, attended, (stack.h, routing)


def decode_weights(spec: ModelSpec, dense: StoredDense, layer: int) -> DecodeWeights | None:
    """Return the weights of a layer for compiled code, or None if its mixer or its precision is not supported."""
    attention, feed_forward = spec.layers[layer].mixer, spec.layers[layer].feed_forward
    if not isinstance(attention, AttentionSpec):
        return None
    prefix = f"layers.{layer}."
    linears = [_linear(dense, f"{prefix}attn.{name}") for name in "qkvo"]
    q, k, v, o = linears
    if q is None or k is None or v is None or o is None:
        return None
    attn_norm, mlp_norm = dense.optional(f"{prefix}attn_norm"), dense.optional(f"{prefix}mlp_norm")
    assert attn_norm is not None and mlp_norm is not None
    return DecodeWeights(
        hidden=spec.hidden_size,
        eps=spec.norm_eps,
        attention=attention,
        router=feed_forward.router if isinstance(feed_forward, MoeSpec) else None,
        attn_norm=attn_norm,
        q_norm=dense.optional(f"{prefix}attn.q_norm"),
        k_norm=dense.optional(f"{prefix}attn.k_norm"),
        mlp_norm=mlp_norm,
        router_weight=dense.optional(f"{prefix}router"),
        q=q,
        k=k,
        v=v,
        o=o,
    )


def _linear(dense: StoredDense, name: str) -> LinearWeights | None:
    record = dense.record(name)
    return None if record is None else LinearWeights(*record, dense.optional(f"{name}_bias"))

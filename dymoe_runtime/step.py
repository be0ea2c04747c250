"""One decoded token through its layers, in compiled code.

The same mathematics as `Decoder`'s and `StoredExperts`', which are the reference: at one token, what NumPy
and Python take to start each of their operations is longer than most of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dymoe_runtime.decoder import Routing
from dymoe_runtime.kernels import _native
from dymoe_runtime.kernels.native import StoredDense, decode_layer, row_address
from dymoe_runtime.kv_cache import KVCache
from dymoe_runtime.memory import address_of
from dymoe_runtime.rope import Rotary
from dymoe_runtime.spec import ModelSpec


class Direct(Protocol):
    """Experts that compiled code can use without asking for them."""

    def ready(self) -> _native.AtHand | None:
        """Those, unless they must be asked for just now."""

    def ran(self, used: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> None:
        """A token has chosen in a layer these experts at these tiers, 0 for what it skips."""


class DecodeStep:
    """The dense half of every layer for one token, and `direct` experts. What it returns holds until its next call."""

    def __init__(self, spec: ModelSpec, dense: StoredDense, isa: str) -> None:
        self._dense = dense  # the layers point into it
        self._rotary = Rotary(spec.rope, spec.head_dim)
        self._tables: tuple[np.ndarray, ...] = ()  # of the position that the layers are at
        self._at, self._rotation = -1, (0, 0)
        self._layers = [decode_layer(isa, spec, dense, layer) for layer in range(spec.num_layers)]
        self._stack = _native.DecodeStack.make(self._layers, spec.activation)
        self._cache: KVCache | None = None  # that the stack knows
        self.direct: Direct | None = None
        # Kept, because making them takes as long as a small layer's norm.
        self._x, self._h = np.empty((1, spec.hidden_size), np.float32), np.empty((1, spec.hidden_size), np.float32)
        self._experts, self._gates = np.empty((1, spec.top_k), np.int64), np.empty((1, spec.top_k), np.float32)
        self._to = address_of(self._x)
        self._chosen = address_of(self._h), address_of(self._experts), address_of(self._gates)
        self._guessed = np.empty((1, spec.top_k), np.int64), np.empty((1, spec.top_k), np.float32)
        self._guessed_h = np.empty((1, spec.hidden_size), np.float32)
        self._guessers: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @staticmethod
    def make(spec: ModelSpec, dense: StoredDense, isa: str) -> DecodeStep | None:
        """None where the attention's matrices are not quantized."""
        quantized = all(dense.record(f"layers.{n}.attn.{m}") for n in range(spec.num_layers) for m in "qkvo")
        return DecodeStep(spec, dense, isa) if quantized else None

    def run(
        self, layer: int, x: np.ndarray, more: np.ndarray | None, cache: KVCache
    ) -> tuple[int, np.ndarray, tuple[np.ndarray, Routing] | None]:
        at = cache.length
        if at != self._at:
            self._tables = cosines, sines = self._rotary.table(at, at + 1)
            self._at, self._rotation = at, (address_of(cosines), address_of(sines))
        if cache is not self._cache:
            self._stack.keep(cache.addresses)
            self._cache = cache
        at_hand = None if self.direct is None else self.direct.ready()
        came = self._to if x is self._x else row_address(x)
        added = 0 if more is None else row_address(more)
        place = at, *self._rotation, self._to
        layer, experts, gates, used = self._stack.run(at_hand, layer, came, added, *place, *self._chosen)
        if used:
            assert self.direct is not None
            self.direct.ran(used)
        if not experts:
            return layer, self._x, None
        return layer, self._x, (self._h, Routing(self._experts, self._gates, self._x, listed=(experts, gates)))

    def correct(self, layer: int, predictor: np.ndarray) -> None:
        """`guess` of this layer adds what predictor [experts, H + 1] says to its router's logits, from now on."""
        router = self._dense.optional(f"layers.{layer}.router")
        assert router is not None and predictor.shape == (router.shape[0], router.shape[1] + 1)
        self._guessers[layer] = router + predictor[:, :-1], predictor[:, -1].copy()

    def guess(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Experts and gates [1, top_k] that `layer` would choose if it were given this residual stream [1, H]."""
        experts, gates = self._guessed
        own = map(address_of, self._guessers.get(layer, ()))
        where = address_of(self._guessed_h), address_of(experts), address_of(gates)
        self._layers[layer].route(address_of(x), *where, *own)
        return experts, gates

"""The state of one sequence: the states of all layers, and the number of tokens that they have seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import numpy as np

from dymoe_runtime.memory import map_memory
from dymoe_runtime.model.mixer import LayerState
from dymoe_runtime.model.mixers import mixer_kind
from dymoe_runtime.spec import ModelSpec

# Each layer's state begins at a multiple of a cache line's bytes.
ALIGN = 64


class Snapshot:
    """A position that a sequence can be rolled back to, valid until the sequence loses tokens before it."""

    def __init__(self, length: int, layers: list[Any]) -> None:
        self.length = length
        self.layers = layers
        self.valid = True

    def invalidate(self) -> None:
        """Mark the snapshot invalid, because the sequence has lost tokens before its position."""
        self.valid = False


class SequenceState:
    """The states of all layers, and `length`, the number of tokens that they have seen.

    With `shared`, all layers use the same memory, which works only for passes over whole windows that nothing follows.
    """

    def __init__(self, spec: ModelSpec, capacity: int, kv_bits: int = 16, shared: bool = False) -> None:
        """Allocate states for `capacity` tokens; a KV cache keeps `kv_bits` bits per value, one of 8, 16 and 32."""
        sizes = _sizes(spec, capacity, kv_bits)
        starts = [0] * len(sizes) if shared else np.cumsum([0, *sizes]).tolist()[:-1]
        memory = np.frombuffer(map_memory(max(sizes) if shared else sum(sizes)), np.uint8)
        self.capacity = capacity
        self.length = 0
        self.layers: list[LayerState] = []
        for layer, start in zip(spec.layers, starts, strict=True):
            kind = mixer_kind(layer.mixer)
            nbytes = kind.state_bytes(layer.mixer, capacity, kv_bits)
            place = memory[start : start + nbytes]
            self.layers.append(kind.make_state(layer.mixer, place, capacity, kv_bits))
        self._snapshots: WeakSet[Snapshot] = WeakSet()

    @staticmethod
    def bytes_needed(spec: ModelSpec, capacity: int, kv_bits: int = 16, shared: bool = False) -> int:
        """Return the bytes of memory that a state with these arguments takes."""
        sizes = _sizes(spec, capacity, kv_bits)
        return max(sizes) if shared else sum(sizes)

    def advance(self, tokens: int) -> None:
        """Add `tokens`, which all layers have seen, to the length."""
        self.length += tokens

    def truncate(self, length: int) -> int:
        """Forget all tokens but the first `length`; return how many are kept, 0 if a layer cannot go back that far."""
        length = max(0, min(length, self.length))
        if length == self.length:
            return length
        if False in [layer.truncate(length) for layer in self.layers]:
            length = 0
            for layer in self.layers:
                layer.truncate(0)
        self._cut(length)
        return length

    @contextlib.contextmanager
    def replaced(self, length: int) -> Iterator[None]:
        """Return a context in which `LayerState.used(length)` of all layers are written; then it has `length` tokens.

        All tokens before are forgotten. If the context fails, there are none.
        """
        self.truncate(0)
        try:
            yield
        except BaseException:
            self.recover()
            raise
        self.advance(length)

    def recover(self) -> None:
        """Forget what a pass that has failed left in some layers: all tokens, if a layer cannot go back otherwise."""
        if False in [layer.truncate(self.length) for layer in self.layers]:
            for layer in self.layers:
                layer.truncate(0)
            self._cut(0)

    def snapshot(self) -> Snapshot:
        """Return a snapshot of the current position for `rollback`."""
        snapshot = Snapshot(self.length, [layer.snapshot() for layer in self.layers])
        self._snapshots.add(snapshot)
        return snapshot

    def rollback(self, snapshot: Snapshot) -> None:
        """Forget all tokens after `snapshot`.

        Raises ValueError if the sequence has lost tokens before the snapshot's position since.
        """
        if not snapshot.valid:
            raise ValueError(f"the sequence has lost tokens before position {snapshot.length} since the snapshot")
        for layer, seen in zip(self.layers, snapshot.layers, strict=True):
            layer.rollback(seen)
        self._cut(snapshot.length)

    def _cut(self, length: int) -> None:
        self.length = length
        for snapshot in self._snapshots:
            if snapshot.length > length:
                snapshot.invalidate()


def _sizes(spec: ModelSpec, capacity: int, kv_bits: int) -> list[int]:
    """Return the bytes of each layer's state, rounded up to a multiple of ALIGN."""
    kinds = ((mixer_kind(layer.mixer), layer.mixer) for layer in spec.layers)
    return [-(-kind.state_bytes(mixer, capacity, kv_bits) // ALIGN) * ALIGN for kind, mixer in kinds]

"""The interface of mixers, the first half of each layer, which moves information between tokens.

A new kind of mixer is one file in `mixers/` with a class that has the members of `MixerKind`, and one row in the table
MIXERS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from dymoe_runtime.kernels.attention_reference import Sight
from dymoe_runtime.kernels.interface import Kernels


class Dense(Protocol):
    """The weights outside the routed experts, in any precision."""

    @property
    def pause(self) -> Callable[[], None] | None:
        """Return what to call between parts of long work on many tokens, so that others go on meanwhile."""

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Return the embeddings of ids [T], float32 [T, H]."""

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """Return x @ W.T, plus the bias if there is one; x [T, cols] -> float32 [T, rows]."""

    def vector(self, name: str) -> np.ndarray:
        """Return a vector, float32 [n], or any other tensor that is not quantized."""


class LayerState(Protocol):
    """The state that one layer keeps of a sequence, such as a KV cache."""

    def truncate(self, length: int) -> bool:
        """Forget all but the first `length` tokens; return False and change nothing if that is impossible.

        It is always possible for length 0.
        """

    def snapshot(self) -> Any:
        """Return what `rollback` needs to restore the state of the tokens seen so far."""

    def rollback(self, snapshot: Any) -> None:
        """Forget the tokens that came after `snapshot` was taken."""

    def used(self, length: int) -> list[np.ndarray]:
        """Return the parts of the memory that keep a sequence of `length` tokens.

        They are contiguous arrays that can be written to, and their sizes do not depend on the capacity. Written to
        another state, they continue the sequence there.
        """


# (q [heads, T, d], k, v [kv_heads, T, d], what a token sees, weigh, sinks [heads] or None) -> outputs and received
# attention as by `Kernels.attend`, for tokens that are a whole sequence and leave no state.
WholeAttention = Callable[
    [np.ndarray, np.ndarray, np.ndarray, Sight, bool, "np.ndarray | None"], "tuple[np.ndarray, np.ndarray | None]"
]


class Mixer(Protocol):
    """The mixer of one layer."""

    def forward(
        self, h: np.ndarray, state: Any, start: int, weigh: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Mix the normalized tokens h [T, H] at positions from `start` on, which follow those in `state`.

        If `state` is None, the tokens are a whole sequence.

        Returns (y, received): what to add to the residual stream, [T, H], and the attention that each token received,
        [T]. The latter is None without `weigh`, or if the mixer has no such measure.
        """


class MixerKind(Protocol):
    """A kind of mixer: a class that makes mixers and their states, and computes their sizes."""

    def __call__(
        self, spec: Any, prefix: str, dense: Dense, kernels: Kernels, whole: WholeAttention | None, eps: float, /
    ) -> Mixer:
        """Make the mixer of a layer; the names of its tensors in `dense` begin with `prefix`.

        `whole`, if given, computes the attention of tokens without a state. `eps` is that of the mixer's norms.
        """

    def state_bytes(self, spec: Any, capacity: int, kv_bits: int, /) -> int:
        """Return the bytes of a layer's state for `capacity` tokens; a KV cache keeps `kv_bits` bits per value."""

    def make_state(self, spec: Any, memory: np.ndarray, capacity: int, kv_bits: int, /) -> LayerState:
        """Make an empty state in `memory`, uint8 [state_bytes], which is all zeros."""

    def workspace_bytes(self, spec: Any, kernels: Kernels, tokens: int, context: int, /) -> int:
        """Return the most bytes that `forward` takes for `tokens`, the last of which attends to `context` tokens."""

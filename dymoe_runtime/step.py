"""One decoded token through the attention and the router of a layer, in compiled code.

The same mathematics as `Decoder.attend` and `Decoder.route`, which are the reference: at one
token, what torch and Python take to start each of their operations is longer than most of them.
"""

from __future__ import annotations

import torch

from dymoe_runtime.decoder import Routing
from dymoe_runtime.kernels.native import StoredDense, decode_layer
from dymoe_runtime.kv_cache import KVCache
from dymoe_runtime.rope import Rotary
from dymoe_runtime.spec import ModelSpec


class DecodeStep:
    """The dense half of every layer for one token. What it returns holds until its next call."""

    def __init__(self, spec: ModelSpec, dense: StoredDense, isa: str) -> None:
        self._dense = dense  # the layers point into it
        self._rotary = Rotary(spec.rope, spec.head_dim)
        self._tables: tuple[torch.Tensor, ...] = ()  # of the position that the layers are at
        self._at, self._rotation = -1, (0, 0)
        self._layers = [decode_layer(isa, spec, dense, layer) for layer in range(spec.num_layers)]
        # Kept, because making them takes as long as a small layer's norm.
        self._x, self._h = torch.empty(1, spec.hidden_size), torch.empty(1, spec.hidden_size)
        self._experts = torch.empty(1, spec.top_k, dtype=torch.int64)
        self._gates = torch.empty(1, spec.top_k)
        self._to = self._x.data_ptr()
        self._chosen = self._h.data_ptr(), self._experts.data_ptr(), self._gates.data_ptr()
        self._lists = self._experts.numpy()[0], self._gates.numpy()[0]
        self._guessed = torch.empty(1, spec.top_k, dtype=torch.int64), torch.empty(1, spec.top_k)
        self._guessed_h = torch.empty(1, spec.hidden_size)
        self._guessers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @staticmethod
    def make(spec: ModelSpec, dense: StoredDense, isa: str) -> DecodeStep | None:
        """None where the attention's matrices are not quantized."""
        quantized = all(dense.record(f"layers.{n}.attn.{m}") for n in range(spec.num_layers) for m in "qkvo")
        return DecodeStep(spec, dense, isa) if quantized else None

    def attend(self, layer: int, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """The residual stream [1, H] after the attention of `layer`; x [1, H], nothing returned by this."""
        at = cache.length
        if at != self._at:
            self._tables = cosines, sines = self._rotary.table(at, at + 1)
            self._at, self._rotation = at, (cosines.data_ptr(), sines.data_ptr())
        self._layers[layer].attend(x.data_ptr(), at, *self._rotation, cache.addresses[layer], self._to)
        return self._x

    def route(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """Normalized x [1, H], and the experts of `layer` for it."""
        self._layers[layer].route(x.data_ptr(), *self._chosen)
        experts, gates = self._lists
        return self._h, Routing(self._experts, self._gates, x, listed=(experts.tolist(), gates.tolist()))

    def correct(self, layer: int, predictor: torch.Tensor) -> None:
        """`guess` of this layer adds what predictor [experts, H + 1] says to its router's logits, from now on."""
        router = self._dense.optional(f"layers.{layer}.router")
        assert router is not None and predictor.shape == (router.shape[0], router.shape[1] + 1)
        self._guessers[layer] = (router + predictor[:, :-1]).contiguous(), predictor[:, -1].contiguous()

    def guess(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and gates [1, top_k] that `layer` would choose if it were given this residual stream [1, H]."""
        experts, gates = self._guessed
        own = [tensor.data_ptr() for tensor in self._guessers.get(layer, ())]
        where = self._guessed_h.data_ptr(), experts.data_ptr(), gates.data_ptr()
        self._layers[layer].route(x.data_ptr(), *where, *own)
        return experts, gates

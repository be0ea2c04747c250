"""The decoder: mixers and dense layers around routed experts, which come behind the `Experts` interface.

The runtime passes stored experts. The compiler calls the parts between the experts, and runs the original model's
experts itself, one after another. Both run the same mathematics.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.mixer import Dense, WholeAttention
from dymoe_runtime.model.mixers import mixer_kind
from dymoe_runtime.model.router import Routers
from dymoe_runtime.model.routing import Experts, PromptRouting, Routing, in_groups, joined
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import ModelSpec

# Arrays of logits that exist at once: the result of the head, and what sampling or scoring derives from it.
LOGITS_AT_ONCE = 3


class Step(Protocol):
    """Compiled layers that one token is decoded through."""

    def run(
        self, layer: int, x: np.ndarray, more: np.ndarray | None, state: SequenceState
    ) -> tuple[int, np.ndarray, bool, tuple[np.ndarray, Routing] | None]:
        """Run whole layers from `layer` on, whose input is x + more [1, H], then perhaps a part of the next one.

        Returns (layer, residual stream [1, H], attended, asked). The layer is the one reached, or the number of layers
        if all have run. `attended` says whether its attention has run, which the residual stream then includes.
        `asked` is (h, routing) for the experts of that layer, or None if its router has not run.
        """


class Decoder:
    """A decoder-only MoE transformer over `dense` weights and routed `experts`."""

    def __init__(
        self,
        spec: ModelSpec,
        dense: Dense,
        experts: Experts,
        kernels: Kernels,
        step: Step | None = None,
        whole: WholeAttention | None = None,
    ) -> None:
        """Build the routers and the mixers of all layers.

        A single token that continues a sequence runs through `step`, if given, which may not need `experts`. `whole`
        computes the attention of tokens without a state. By default they attend as with a 32-bit KV cache.
        """
        self.spec = spec
        self.dense = dense
        self.routers = Routers(spec, dense, kernels)
        self._experts = experts
        self._kernels = kernels
        self._step = step
        self._mixers = [
            mixer_kind(layer.mixer)(layer.mixer, f"layers.{n}.", dense, kernels, whole, spec.norm_eps)
            for n, layer in enumerate(spec.layers)
        ]

    @np.errstate(over="ignore", invalid="ignore")  # callers check the results for values that are not finite
    def forward(self, ids: np.ndarray, state: SequenceState | None = None) -> np.ndarray:
        """Return the hidden states [T, H] of ids [T] after all layers; each token chooses tiers by itself.

        The tokens continue `state`; without one they are a whole sequence.
        """
        x = self.embed(ids)
        if self._step is not None and state is not None and len(ids) == 1:
            x = self._run_step(self._step, x, state)
        else:
            start = 0 if state is None else state.length
            for layer in range(self.spec.num_layers):
                x, _ = self.mix(layer, x, state, start)
                x = self.feed_forward(layer, x)
        if state is not None:
            state.advance(len(ids))
        return x

    @np.errstate(over="ignore", invalid="ignore")
    def prefill(self, ids: np.ndarray, state: SequenceState, group: int, weigh: bool = True) -> np.ndarray:
        """Return the hidden states [T, H] of a prompt's ids [T], which continue `state`.

        Each chunk of `group` tokens chooses its tiers as if it were a call of its own, but the experts of a layer are
        called once for all chunks. With `weigh`, token weights are the attention that tokens receive; else all are 1.
        """
        x = self.embed(ids)
        for layer in range(self.spec.num_layers):
            x, token_weights = self._mix_chunks(layer, x, state, group, weigh)
            x = self._feed_chunks(layer, x, token_weights, group)
        state.advance(len(ids))
        return x

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Return the embeddings float32 [T, H] of ids [T]."""
        return self.dense.embed(ids)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return the logits float32 [T, vocab] of hidden states [T, H]."""
        return self.dense.linear("embed" if self.spec.tie_embeddings else "lm_head", self.norm("norm", x))

    def mix(
        self, layer: int, x: np.ndarray, state: SequenceState | None = None, start: int = 0, weigh: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the residual stream [T, H] after the mixer of `layer`, and the token weights [T], mean 1."""
        h = self.norm(f"layers.{layer}.attn_norm", x)
        of_layer = None if state is None else state.layers[layer]
        y, mass = self._mixers[layer].forward(h, of_layer, start, weigh)
        weights = np.ones(len(x), np.float32) if mass is None else mass / max(mass.sum(), 1e-20) * len(x)
        return x + y, weights

    def feed_forward(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Return the residual stream [T, H] after the experts, or the dense MLP, of `layer`."""
        if not self.spec.is_moe(layer):
            return self._dense_mlp(layer, x)
        h, experts, weights = self.route(layer, x)
        y: np.ndarray = x + self._experts.decode(layer, h, Routing(experts, weights, x))
        return y

    def route(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the input of the experts of `layer` and their routing, from the residual stream x [T, H].

        Returns (h, experts, weights): the norm of x, [T, H]; the experts, int64 [T, k], highest weight first; and the
        routing weights, float32 [T, k].
        """
        return self.routers.route_residual(layer, x)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """Return x [T, H] normalized with the weights called `name`."""
        return self._kernels.norm(x, self.dense.vector(name), self.spec.norm_eps)

    @staticmethod
    def workspace_bytes(spec: ModelSpec, kernels: Kernels, tokens: int, context: int) -> int:
        """Return the most bytes that a pass of `tokens` takes, the last of which attends to `context` tokens."""
        hidden, moe = spec.hidden_size, spec.moe
        dense = 0 if len(spec.moe_layers) == spec.num_layers else spec.dense_width
        # The residual stream and the term added to it, twice each; the outputs of the experts; gate and up, twice each.
        row = (8 + spec.top_k) * hidden + 4 * moe.width + 3 * dense + 2 * moe.router.experts
        mixers = (
            mixer_kind(layer.mixer).workspace_bytes(layer.mixer, kernels, tokens, context) for layer in spec.layers
        )
        return 4 * (tokens * row + LOGITS_AT_ONCE * spec.vocab_size) + max(mixers) + kernels.product_bytes()

    @staticmethod
    def chunk_bytes(spec: ModelSpec, tokens: int) -> int:
        """Return the bytes that each prompt chunk of `tokens` after the first adds to a pass that calls experts once.

        These are the residual stream and its norm, with their joined copies; the experts' outputs, by (token, expert)
        pair and summed; and for each pair its expert, weight, tier, row and sort indices.
        """
        return tokens * (4 * (spec.top_k + 6) * spec.hidden_size + 64 * spec.top_k)

    def _run_step(self, step: Step, x: np.ndarray, state: SequenceState) -> np.ndarray:
        layer, more = 0, None
        while layer < self.spec.num_layers:
            layer, x, attended, asked = step.run(layer, x, more, state)
            more = None
            if layer == self.spec.num_layers:
                break
            if not attended:
                x, _ = self.mix(layer, x, state, state.length)
            if asked is not None:
                more = self._experts.decode(layer, *asked)
            else:
                x = self.feed_forward(layer, x)
            layer += 1
        return x.copy() if more is None else x + more

    def _mix_chunks(
        self, layer: int, x: np.ndarray, state: SequenceState, group: int, weigh: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run the mixer chunk by chunk; return the residual stream [T, H] and the token weights [T]."""
        start, mixed = state.length, []
        for rows in in_groups(x, group):
            mixed.append(self.mix(layer, rows, state, start, weigh))
            start += len(rows)
        return joined([rows for rows, _ in mixed]), joined([token_weights for _, token_weights in mixed])

    def _feed_chunks(self, layer: int, x: np.ndarray, token_weights: np.ndarray, group: int) -> np.ndarray:
        """Return the residual stream [T, H] after the experts, which are called once for all chunks."""
        chunks = in_groups(x, group)
        if not self.spec.is_moe(layer):
            return joined([self._dense_mlp(layer, rows) for rows in chunks])
        h, experts, weights = map(joined, zip(*(self.route(layer, rows) for rows in chunks), strict=True))
        y: np.ndarray = x + self._experts.prefill(layer, h, PromptRouting(experts, weights, x, token_weights, group))
        return y

    def _dense_mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        h = self.norm(f"layers.{layer}.mlp_norm", x)
        gate, up = (self.dense.linear(f"layers.{layer}.mlp.{name}", h) for name in ("gate", "up"))
        hidden = self._kernels.activate(gate, up, self.spec.activation)
        y: np.ndarray = x + self.dense.linear(f"layers.{layer}.mlp.down", hidden)
        return y

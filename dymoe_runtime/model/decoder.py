"""The decoder: mixers and dense layers around routed experts, which come behind the `Experts` interface.

The runtime passes stored experts. The compiler calls the parts between the experts, and runs the original model's
experts itself, one after another. Both run the same mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.mixer import Dense, WholeAttention
from dymoe_runtime.model.mixers import mixer_kind
from dymoe_runtime.model.norms import Norms
from dymoe_runtime.model.router import Routers
from dymoe_runtime.model.routing import Experts, PromptRouting, Routing, chunk_lengths, in_chunks, in_groups, joined
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import MlpSpec, ModelSpec, MoeSpec, SharedSpec

# Arrays of logits that exist at once: the result of the head, and what sampling or scoring derives from it.
LOGITS_AT_ONCE = 3


class Step(Protocol):
    """Compiled layers that tokens are decoded through, one token T of each of some sequences."""

    def run(
        self, layer: int, x: np.ndarray, more: np.ndarray | None, states: Sequence[SequenceState]
    ) -> tuple[int, np.ndarray, bool, tuple[np.ndarray, Routing] | None]:
        """Run whole layers from `layer` on, then perhaps a part of the next one.

        x [T, H] are the residual streams that enter `layer`. If `more` is given, x are the residual streams that the
        experts of the layer before have read, and `more` their output: `Decoder.finish` is still to be done.

        Returns (layer, residual streams [T, H], attended, asked). The layer is the one reached, or the number of layers
        if all have run. `attended` says whether its attention has run, which the residual streams then include.
        `asked` is (h, routing) for the experts of that layer, or None if neither its attention nor its router has run.
        A token's results do not depend on the other tokens. `states` must not change; passing it again saves time.
        """


class Chunk(NamedTuple):
    """Tokens of a prompt that choose their tiers together, and the position from which they continue `state`."""

    state: SequenceState
    start: int
    tokens: int


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

        Single tokens that continue sequences run through `step`, if given, which may not need `experts`. `whole`
        computes the attention of tokens without a state. By default they attend as with a 32-bit KV cache.
        """
        self.spec = spec
        self.dense = dense
        self.routers = Routers(spec, dense, kernels)
        self._norms = Norms(spec, dense, kernels)
        self._experts = experts
        self._kernels = kernels
        self._step = step
        self._single: tuple[SequenceState, ...] = ()
        self._mixers = [
            mixer_kind(layer.mixer)(layer.mixer, f"layers.{n}.", dense, kernels, whole, spec.norm_eps)
            for n, layer in enumerate(spec.layers)
        ]

    @np.errstate(over="ignore", invalid="ignore")  # callers check the results for values that are not finite
    def forward(self, ids: np.ndarray, state: SequenceState | None = None) -> np.ndarray:
        """Return the hidden states [T, H] of ids [T] after all layers; each token chooses tiers by itself.

        The tokens continue `state`; without one they are a whole sequence.
        """
        if state is None:
            return self._run_layers(ids, None)
        with _Pass(self._alone(state), [len(ids)]):
            if self._step is not None and len(ids) == 1:
                return self._run_step(self._step, self.embed(ids), self._alone(state))
            return self._run_layers(ids, state)

    @np.errstate(over="ignore", invalid="ignore")
    def decode_each(self, ids: np.ndarray, states: Sequence[SequenceState]) -> np.ndarray:
        """Return the hidden states [T, H] after all layers of one token of each sequence; ids [T] continue `states`.

        Each expert is read and run once for all tokens that chose it. With `batch_invariant` kernels, a token's result
        equals that of `forward`, bit for bit.
        """
        with _Pass(states, [1] * len(states)):
            if self._step is not None:
                return self._run_step(self._step, self.embed(ids), states)
            x = self.embed(ids)
            for layer in range(self.spec.num_layers):
                x = self._feed_each(layer, x, states)
            return x

    def prefill(self, ids: np.ndarray, state: SequenceState, group: int, weigh: bool = True) -> np.ndarray:
        """Return the hidden states [T, H] of a prompt's ids [T], which continue `state`.

        Each chunk of `group` tokens chooses its tiers as if it were a call of its own, but the experts of a layer are
        called once for all chunks. With `weigh`, token weights are the attention that tokens receive; else all are 1.
        """
        return self.prefill_each([(ids, state)], group, weigh)[0]

    @np.errstate(over="ignore", invalid="ignore")
    def prefill_each(
        self,
        prompts: Sequence[tuple[np.ndarray, SequenceState]],
        group: int,
        weigh: bool = True,
        pause: Callable[[], None] | None = None,
    ) -> list[np.ndarray]:
        """Return the hidden states [T, H] of each of some prompts, whose ids [T] continue different states.

        The experts of a layer are called once for all of them. With `batch_invariant` kernels, the results equal those
        of `prefill`, bit for bit. `pause` is called often between parts of the work; tokens of other sequences may run
        in it, but none of these. What it raises ends the pass.
        """
        states = [state for _, state in prompts]
        chunks = [
            Chunk(state, state.length + sum(lengths[:n]), tokens)
            for ids, state in prompts
            for lengths in (chunk_lengths(len(ids), group),)
            for n, tokens in enumerate(lengths)
        ]
        with _Pass(states, [len(ids) for ids, _ in prompts]):
            x = self.embed(np.concatenate([ids for ids, _ in prompts]))
            for layer in range(self.spec.num_layers):
                x, read, token_weights = self._mix_chunks(layer, x, chunks, weigh, pause)
                x = self._feed_chunks(layer, x, read, token_weights, chunks, pause)
            return in_chunks(x, [len(ids) for ids, _ in prompts])

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Return the embeddings float32 [T, H] of ids [T]."""
        x = self.dense.embed(ids)
        return x if self.spec.embed_scale == 1 else x * np.float32(self.spec.embed_scale)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return the logits float32 [T, vocab] of hidden states [T, H]."""
        logits = self.dense.linear(self.spec.head, self._norms.apply("norm", x))
        if self.spec.logit_scale != 1:
            logits *= np.float32(self.spec.logit_scale)
        if cap := np.float32(self.spec.logit_softcap):
            logits /= cap
            np.tanh(logits, out=logits)
            logits *= cap
        return logits

    def mix(
        self, layer: int, x: np.ndarray, state: SequenceState | None = None, start: int = 0, weigh: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the residual stream [T, H] after the mixer of `layer`, and the token weights [T], mean 1.

        In a parallel layer, the dense MLP or the shared expert runs here, too, because it reads the same as the mixer.
        """
        known = self.spec.layers[layer]
        h = self._norms.apply(f"layers.{layer}.attn_norm", x) if known.pre_norms else x
        of_layer = None if state is None else state.layers[layer]
        y, mass = self._mixers[layer].forward(h, of_layer, start, weigh)
        weights = np.ones(len(x), np.float32) if mass is None else mass / max(mass.sum(), 1e-20) * len(x)
        if known.post_norms:
            y = self._norms.apply(f"layers.{layer}.attn_post_norm", y)
        if known.parallel:
            y = y + self._dense_part(layer, h)
        return x + (y if known.residual_scale == 1 else y * np.float32(known.residual_scale)), weights

    def feed_forward(self, layer: int, x: np.ndarray, read: np.ndarray) -> np.ndarray:
        """Return the residual stream [T, H] after the experts, or the dense MLP, of `layer`.

        x [T, H] is the residual stream after its mixer, `read` [T, H] what the method of that name returns.
        """
        if not self.spec.is_moe(layer):
            return x if self.spec.layers[layer].parallel else self._dense_mlp(layer, x)
        h, experts, weights = self.route(layer, read)
        return self.finish(layer, x, self._experts.decode(layer, h, Routing(experts, weights, x)))

    def read(self, layer: int, x: np.ndarray, entered: np.ndarray) -> np.ndarray:
        """Return the residual stream that the experts of `layer` read: x, after the mixer, or the one that enters."""
        return entered if self.spec.layers[layer].parallel else x

    def only_adds(self, layer: int) -> bool:
        """Return whether `finish` does nothing but add the output of the experts."""
        known, shared = self.spec.layers[layer], self._shared_after(layer) is not None
        return not (shared or known.post_norms or known.scalar or known.residual_scale != 1)

    def finish(self, layer: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the residual stream [T, H] that leaves `layer`.

        x [T, H] is the residual stream after the mixer, and y [T, H] the weighted sum of the experts' outputs. The
        shared expert, the norms of outputs and the scales come here.
        """
        if self.only_adds(layer):
            added: np.ndarray = x + y
            return added
        shared = self._shared_after(layer)
        if shared is not None:
            y = self._with_shared(layer, shared, x, y)
        return self._joined(layer, x, y)

    def route(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the input of the experts of `layer` and their routing, from the residual stream x [T, H] they read.

        Returns (h, experts, weights): the norm of x, [T, H]; the experts, int64 [T, k], highest weight first; and the
        routing weights, float32 [T, k].
        """
        return self.routers.route_residual(layer, x)

    @staticmethod
    def workspace_bytes(spec: ModelSpec, kernels: Kernels, tokens: int, context: int) -> int:
        """Return the most bytes that a pass of `tokens` takes, the last of which attends to `context` tokens."""
        hidden, moe = spec.hidden_size, spec.moe
        widths = [layer.feed_forward.width for layer in spec.layers if isinstance(layer.feed_forward, MlpSpec)]
        dense = max([*widths, moe.shared.width if moe.shared else 0])
        # The residual stream and the term added to it, twice each; the outputs of the experts; gate and up, twice each.
        row = (8 + _read_beside(spec) + spec.top_k) * hidden + 4 * moe.width + 3 * dense + 2 * moe.router.experts
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
        return tokens * (4 * (spec.top_k + 6 + _read_beside(spec)) * spec.hidden_size + 64 * spec.top_k)

    def _run_layers(self, ids: np.ndarray, state: SequenceState | None) -> np.ndarray:
        x, start = self.embed(ids), 0 if state is None else state.length
        for layer in range(self.spec.num_layers):
            x, read = self._mix_whole(layer, x, state, start)
            x = self.feed_forward(layer, x, read)
        return x

    def _mix_whole(
        self, layer: int, x: np.ndarray, state: SequenceState | None, start: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the residual stream [T, H] after the mixer, and the one that the experts read."""
        mixed, _ = self.mix(layer, x, state, start)
        return mixed, self.read(layer, mixed, x)

    def _alone(self, state: SequenceState) -> Sequence[SequenceState]:
        """Return the states of a single sequence, the same object as long as it is the same sequence."""
        if not self._single or self._single[0] is not state:
            self._single = (state,)
        return self._single

    def _feed_each(self, layer: int, x: np.ndarray, states: Sequence[SequenceState]) -> np.ndarray:
        """Return the residual streams [T, H] after `layer` of one token of each sequence."""
        parts = [
            self._mix_whole(layer, row, state, state.length) for row, state in zip(in_groups(x, 1), states, strict=True)
        ]
        mixed, read = (joined(rows) for rows in zip(*parts, strict=True))
        return self.feed_forward(layer, mixed, read)

    def _run_step(self, step: Step, x: np.ndarray, states: Sequence[SequenceState]) -> np.ndarray:
        """Return the hidden states [T, H] of single tokens after all layers; what `step` does not run is done here."""
        layer, more, layers = 0, None, self.spec.num_layers
        while layer < layers or more is not None:
            layer, x, attended, asked = step.run(layer, x, more, states)
            more = None
            if layer == layers:
                break
            if asked is not None:
                more = self._experts.decode(layer, *asked)
            else:
                assert not attended
                x = self._feed_each(layer, x, states)
            layer += 1
        return x.copy()

    def _mix_chunks(
        self, layer: int, x: np.ndarray, chunks: Sequence[Chunk], weigh: bool, pause: Callable[[], None] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run the mixer chunk by chunk.

        Returns the residual stream [T, H], the one that the experts read, and the token weights [T].
        """
        mixed = []
        for rows, chunk in zip(in_chunks(x, [chunk.tokens for chunk in chunks]), chunks, strict=True):
            mixed.append(self.mix(layer, rows, chunk.state, chunk.start, weigh))
            if pause is not None:
                pause()
        after = joined([rows for rows, _ in mixed])
        return after, self.read(layer, after, x), joined([token_weights for _, token_weights in mixed])

    def _feed_chunks(
        self,
        layer: int,
        x: np.ndarray,
        read: np.ndarray,
        token_weights: np.ndarray,
        chunks: Sequence[Chunk],
        pause: Callable[[], None] | None,
    ) -> np.ndarray:
        """Return the residual stream [T, H] after the experts, which read `read` and are called once for all chunks."""
        lengths = [chunk.tokens for chunk in chunks]
        if not self.spec.is_moe(layer):
            return joined([self.feed_forward(layer, rows, rows) for rows in in_chunks(x, lengths)])
        routed = (self.route(layer, rows) for rows in in_chunks(read, lengths))
        h, experts, weights = map(joined, zip(*routed, strict=True))
        by_share = self.spec.moe.router.weighs_by_share
        routing = PromptRouting(experts, weights, x, token_weights, lengths, by_share, pause)
        y = self._experts.prefill(layer, h, routing)
        if self.only_adds(layer):
            return self.finish(layer, x, y)
        pairs = zip(in_chunks(x, lengths), in_chunks(y, lengths), strict=True)
        return joined([self.finish(layer, rows, output) for rows, output in pairs])

    def _dense_part(self, layer: int, h: np.ndarray) -> np.ndarray:
        """Return what the dense MLP or the shared expert of `layer` makes of h [T, H], 0 if it has neither."""
        part = self.spec.layers[layer].feed_forward
        if isinstance(part, MlpSpec):
            return self._mlp(f"layers.{layer}.mlp", h)
        return np.zeros_like(h) if part.shared is None else self._shared(layer, part.shared, h)

    def _dense_mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        return self._joined(layer, x, self._mlp(f"layers.{layer}.mlp", self.routers.expert_input(layer, x)))

    def _shared_after(self, layer: int) -> SharedSpec | None:
        """Return the shared expert that runs after the routed ones, if any: that of a parallel layer runs in `mix`."""
        known = self.spec.layers[layer]
        return known.feed_forward.shared if isinstance(known.feed_forward, MoeSpec) and not known.parallel else None

    def _mlp(self, name: str, h: np.ndarray) -> np.ndarray:
        """Return the output of a dense MLP for h [T, H]."""
        gate, up = (self.dense.linear(f"{name}.{part}", h) for part in ("gate", "up"))
        return self.dense.linear(f"{name}.down", self._kernels.activate(gate, up, self.spec.activation))

    def _with_shared(self, layer: int, shared: SharedSpec, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the sum of y [T, H] and the output of the shared expert for a residual stream x [T, H]."""
        prefix = f"layers.{layer}."
        if shared.own_norms:
            h, y = self._norms.apply(f"{prefix}shared_norm", x), self._norms.apply(f"{prefix}experts_post_norm", y)
        else:
            h = self.routers.expert_input(layer, x)
        total: np.ndarray = y + self._shared(layer, shared, h)
        return total

    def _shared(self, layer: int, shared: SharedSpec, h: np.ndarray) -> np.ndarray:
        """Return the output of the shared expert for its input h [T, H]."""
        prefix = f"layers.{layer}."
        output = self._mlp(f"{prefix}shared", h)
        if shared.own_norms:
            output = self._norms.apply(f"{prefix}shared_post_norm", output)
        if shared.gated:
            output *= sigmoid(self._kernels.matmul(h, self.dense.vector(f"{prefix}shared_gate")[None]))
        if shared.scale != 1:
            output *= np.float32(shared.scale)
        return output

    def _joined(self, layer: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the residual stream x [T, H] with the output y [T, H] of the feed-forward part."""
        known = self.spec.layers[layer]
        if known.post_norms:
            y = self._norms.apply(f"layers.{layer}.mlp_post_norm", y)
        if known.residual_scale != 1:
            y = y * np.float32(known.residual_scale)
        joined_up: np.ndarray = x + y
        if known.scalar:
            joined_up *= self.dense.vector(f"layers.{layer}.scalar")
        return joined_up


def _read_beside(spec: ModelSpec) -> int:
    """Return how many residual streams wait for the experts of a layer beside that after its mixer, 0 or 1."""
    return int(any(layer.parallel for layer in spec.layers))


class _Pass:  # no generator, which would take longer for each token
    """A context in which tokens of sequences run through all layers: `tokens[n]` of `states[n]`.

    Then they belong to the sequences, which recover if the pass fails.
    """

    def __init__(self, states: Sequence[SequenceState], tokens: Sequence[int]) -> None:
        self._states, self._tokens = states, tokens

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for state, tokens in zip(self._states, self._tokens, strict=True):
            if kind is None:
                state.advance(tokens)
            else:
                state.recover()


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)), float32 like x."""
    with np.errstate(over="ignore"):
        y: np.ndarray = 1 / (1 + np.exp(-x))
    return y

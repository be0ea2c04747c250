"""How the memory of a run is divided, and the least that works."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dymoe_runtime import kernels
from dymoe_runtime.bundle import DENSE, LOOK_AHEAD, Bundle
from dymoe_runtime.device import format_size, memory_limit, release_code, resident_bytes
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kv_cache import HEAVY_HITTER_QUERIES, KVCache
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.store import full_arena_bytes, least_arena_bytes

# Prompt tokens whose tiers are chosen together. Fixed, because their tiers depend on which they are.
CHUNK = 256
# What Python and the allocator may still take after loading, with the code of libraries that is needed again.
RESERVE_BYTES = 24 << 20
# The same where torch is among these.
TORCH_RESERVE_BYTES = 48 << 20
# What Python and its libraries hold varies by so much from run to run, with what of their files is in the page cache.
SPREAD_BYTES = 8 << 20
# What a run needs before it loads anything, where it cannot be measured: Python, NumPy and a tokenizer.
PROCESS_BYTES = 64 << 20
# What torch takes beside these.
TORCH_BYTES = 140 << 20
# Positions of a window that is scored whose logits are held at once.
SCORED_ROWS = 64


@dataclass(frozen=True)
class Budget:
    """How the process's memory is divided, in bytes."""

    memory: int
    begun: int  # resident before anything is loaded
    fixed: int  # of these, what is needed on
    dense: int
    kv_cache: int
    workspace: int  # activations of a prompt chunk, and the reserve
    least_arena: int
    full_arena: int
    chunk: int  # activations of each prompt chunk that a pass has beyond one
    spare: int = 0  # of the workspace, what the arena has but while a prompt runs

    @property
    def floor(self) -> int:
        """The least memory that works, in whole MiB."""
        return max(self.need, _whole(self.begun))

    @property
    def need(self) -> int:
        """The same, of a process that has begun."""
        return _whole(self.fixed + self.dense + self.kv_cache + self.workspace + self.least_arena)

    @property
    def arena(self) -> int:
        return min(self._room, self.full_arena)

    @property
    def _room(self) -> int:
        """For the arena, but while a prompt runs."""
        return self.memory - self.need + self.least_arena + self.spare

    def lent(self, tokens: int) -> int:
        """Of the arena, what it lends to a pass of so many tokens of a prompt."""
        chunks = -(-tokens // CHUNK)
        need = self.spare * (min(tokens, CHUNK) - 1) // (CHUNK - 1) + (chunks - 1) * self.chunk
        return max(0, need - (self._room - self.arena))

    def with_arena(self, nbytes: int) -> Budget:
        """The budget that leaves an arena of so many bytes, of which a prompt of one chunk takes nothing."""
        return replace(self, memory=nbytes + self.need - self.least_arena, spare=0)


def _whole(nbytes: int) -> int:
    return math.ceil(nbytes / (1 << 20)) << 20


def plan_budget(
    bundle: Bundle,
    context: int,
    memory: int | None = None,
    beside: int = 0,
    fixed: int | None = None,
    window: int | None = None,
    kv_bits: int = 16,
) -> Budget:
    """Divide `memory` bytes (None: what this process may use) of which `fixed` (None: what it needs now) are taken.

    `beside` bytes of what it needs now are not to be taken from them.

    Room is made for a KV cache of `context` tokens, or for passes of `window` tokens that are not continued.
    """
    experts = len(bundle.manifest.layers) * bundle.spec.num_experts
    workspace = workspace_bytes(bundle.spec, window or context, window or CHUNK)
    if window:  # logits, what is left of them by their largest, and its exponentials
        workspace += 3 * 4 * min(SCORED_ROWS, window) * bundle.spec.vocab_size
    begun = fixed if fixed is not None else resident_bytes() - beside
    if fixed is None:
        release_code()
        fixed = resident_bytes() - beside
    return Budget(
        memory=memory if memory is not None else memory_limit(),
        begun=begun,
        fixed=fixed,
        dense=bundle.manifest.files[DENSE].nbytes + 2 * bundle.manifest.files[LOOK_AHEAD].nbytes,
        kv_cache=KVCache.bytes_needed(bundle.spec, window or context, kv_bits, one_layer=bool(window)),
        workspace=workspace + (TORCH_RESERVE_BYTES if kernels.isa() == kernels.REFERENCE else RESERVE_BYTES),
        least_arena=least_arena_bytes(bundle.layout, experts),
        full_arena=full_arena_bytes(bundle.layout, experts),
        chunk=CHUNK * (4 * (bundle.spec.top_k + 6) * bundle.spec.hidden_size + 64 * bundle.spec.top_k),
        spare=0 if window else max(0, workspace - workspace_bytes(bundle.spec, context, 1) - kept_bytes(bundle.spec)),
    )


def pass_tokens(left: int, used: int, budget: Budget) -> int:
    """How many of the `left` tokens of a prompt to run in the next pass, so that the prompt reads the fewest bytes.

    A pass of one or more chunks reads the experts that a prompt uses, of `used` bytes, but for what is in memory. Each
    chunk takes memory from the arena, which is read again after it.
    """
    if kernels.isa() == kernels.REFERENCE:  # whose results depend a little on how many rows it is given
        return min(left, CHUNK)
    if left % CHUNK == 1 and left > 1:
        left -= 1  # a token that is alone is computed differently, and so it always is

    def read(chunks: int) -> int:
        lent = budget.lent(chunks * CHUNK)
        return -(-left // (chunks * CHUNK)) * max(0, used - (budget.arena - lent)) + lent

    most = 1 + max(0, budget.arena - budget.lent(CHUNK) - budget.least_arena) // budget.chunk
    return min(left, CHUNK * min(range(1, min(most, -(-left // CHUNK)) + 1), key=read))


def check_budget(budget: Budget) -> None:
    """DymoeError that names the least that works if the memory is too little."""
    if budget.memory < budget.floor:
        least = (budget.floor + SPREAD_BYTES) >> 20
        raise DymoeError(
            f"memory budget of {format_size(budget.memory)} is too small for this bundle: "
            f"the least that works is --memory {least}MiB"
        )


def kept_bytes(spec: ModelSpec) -> int:
    """What the compiled kernels keep after a prompt of a chunk: its tokens quantized, and hidden activations."""
    widest = max(spec.hidden_size, spec.expert_width, spec.dense_width, spec.num_heads * spec.head_dim)
    return CHUNK * (2 * 4 * spec.expert_width + 2 * widest * 5 // 4)


def workspace_bytes(spec: ModelSpec, context: int, tokens: int) -> int:
    """An upper bound of the activations of a pass of `tokens` that sees `context` tokens."""
    heads = spec.num_heads * spec.head_dim
    rows = (
        (8 + spec.top_k) * spec.hidden_size
        + 6 * heads
        + 4 * spec.expert_width
        + 3 * spec.dense_width
        + 2 * spec.num_experts
    )
    if kernels.isa() == kernels.REFERENCE:
        from dymoe_runtime.kernels.descent_reference import WEIGHTS_AT_ONCE  # imports torch

        scores = (CHUNK + 3 * HEAVY_HITTER_QUERIES * spec.num_heads + 2 * spec.num_kv_heads * spec.head_dim) * context
        scores += tokens * context if spec.sliding_window else 0
        scores += 8 * WEIGHTS_AT_ONCE
    else:
        scores = spec.num_heads * (context + HEAVY_HITTER_QUERIES // 8 * tokens) + spec.num_kv_heads * tokens
    return 4 * (tokens * rows + scores + 3 * spec.vocab_size)

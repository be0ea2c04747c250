"""How the memory of a run is divided, and the least that works."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dymoe_runtime import kernels
from dymoe_runtime.attention import HEAVY_HITTER_QUERIES
from dymoe_runtime.bundle import DENSE, LOOK_AHEAD, Bundle
from dymoe_runtime.device import format_size, memory_limit, resident_bytes
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.reference import WEIGHTS_AT_ONCE
from dymoe_runtime.kv_cache import KVCache
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.store import full_arena_bytes, least_arena_bytes

# Prompt tokens whose tiers are chosen together. Fixed, because their tiers depend on which they are.
CHUNK = 256
# What Python, torch and the allocator may still take after loading.
RESERVE_BYTES = 32 << 20
# What Python and its libraries hold varies by so much from run to run, with what of their files is in the page cache.
SPREAD_BYTES = 8 << 20
# What a run holds before it loads anything, where it cannot be measured: Python and torch.
PROCESS_BYTES = 280 << 20


@dataclass(frozen=True)
class Budget:
    """How the process's memory is divided, in bytes."""

    memory: int
    fixed: int  # resident before anything is loaded
    dense: int
    kv_cache: int
    workspace: int  # activations of a prompt chunk, and the reserve
    least_arena: int
    full_arena: int
    chunk: int  # activations of each prompt chunk that a pass has beyond one

    @property
    def floor(self) -> int:
        """The least memory that works, rounded up to MiB."""
        need = self.fixed + self.dense + self.kv_cache + self.workspace + self.least_arena
        return math.ceil(need / (1 << 20)) << 20

    @property
    def arena(self) -> int:
        return min(self.memory - self.floor + self.least_arena, self.full_arena)


def plan_budget(
    bundle: Bundle,
    context: int,
    memory: int | None = None,
    fixed: int | None = None,
    window: int | None = None,
    kv_bits: int = 16,
) -> Budget:
    """Divide `memory` bytes (None: what this process may use) of which `fixed` (None: what it holds now) are taken.

    Room is made for a KV cache of `context` tokens, or for passes of `window` tokens that are not continued.
    """
    experts = len(bundle.manifest.layers) * bundle.spec.num_experts
    return Budget(
        memory=memory if memory is not None else memory_limit(),
        fixed=fixed if fixed is not None else resident_bytes(),
        dense=bundle.manifest.files[DENSE].nbytes + 2 * bundle.manifest.files[LOOK_AHEAD].nbytes,
        kv_cache=KVCache.bytes_needed(bundle.spec, window or context, kv_bits, one_layer=bool(window)),
        workspace=workspace_bytes(bundle.spec, window or context, window or CHUNK) + RESERVE_BYTES,
        least_arena=least_arena_bytes(bundle.layout),
        full_arena=full_arena_bytes(bundle.layout, experts),
        chunk=CHUNK * (4 * (bundle.spec.top_k + 6) * bundle.spec.hidden_size + 64 * bundle.spec.top_k),
    )


def pass_tokens(left: int, used: int, arena: int, budget: Budget) -> int:
    """How many of the `left` tokens of a prompt to run in the next pass, so that the prompt reads the fewest bytes.

    A pass of one or more chunks reads the experts that a prompt uses, of `used` bytes, but for what is in memory. Each
    chunk beyond one takes memory from an `arena` of so many bytes, which is read again after it.
    """
    if kernels.isa() == "torch":  # whose results depend a little on how many rows it is given
        return min(left, CHUNK)
    if left % CHUNK == 1 and left > 1:
        left -= 1  # a token that is alone is computed differently, and so it always is

    def read(chunks: int) -> int:
        lent = (chunks - 1) * budget.chunk
        return -(-left // (chunks * CHUNK)) * max(0, used - (arena - lent)) + lent

    most = 1 + max(0, arena - budget.least_arena) // budget.chunk
    return min(left, CHUNK * min(range(1, min(most, -(-left // CHUNK)) + 1), key=read))


def check_budget(budget: Budget) -> None:
    """DymoeError that names the least that works if the memory is too little."""
    if budget.memory < budget.floor:
        least = (budget.floor + SPREAD_BYTES) >> 20
        raise DymoeError(
            f"memory budget of {format_size(budget.memory)} is too small for this bundle: "
            f"the least that works is --memory {least}MiB"
        )


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
    if kernels.isa() == "torch":
        scores = (CHUNK + 3 * HEAVY_HITTER_QUERIES * spec.num_heads + 2 * spec.num_kv_heads * spec.head_dim) * context
        scores += tokens * context if spec.sliding_window else 0
        scores += 8 * WEIGHTS_AT_ONCE
    else:
        scores = spec.num_heads * (context + HEAVY_HITTER_QUERIES // 8 * tokens) + spec.num_kv_heads * tokens
    return 4 * (tokens * rows + scores + 3 * spec.vocab_size)

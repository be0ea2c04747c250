"""The division of a run's memory, and the part of the arena that a prompt borrows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.units import format_size

# Prompt tokens whose tiers are chosen together. The number is fixed, because the tiers depend on it.
CHUNK = 256


@dataclass(frozen=True)
class Budget:
    """The division of the process's memory, in bytes."""

    memory_bytes: int
    process_bytes: int  # resident before anything is loaded
    floor_process_bytes: int  # upper estimate of process_bytes for any process that runs this bundle
    dense_bytes: int
    state_bytes: int  # KV cache and other state of the layers
    workspace_bytes: int  # activations of a prompt chunk, and the allocator's reserve
    min_arena_bytes: int
    full_arena_bytes: int
    chunk_bytes: int  # activations of each prompt chunk after the first of a pass
    spare_bytes: int = 0  # part of the workspace that the arena uses while no prompt runs
    chunk_tokens: int = CHUNK  # tokens of a prompt chunk

    @property
    def floor_bytes(self) -> int:
        """Return the minimum memory for this bundle, a whole number of MiB; users are told this figure."""
        return self._need(self.floor_process_bytes)

    @property
    def arena_bytes(self) -> int:
        """Return the arena's size while no prompt runs."""
        return min(self._left_bytes, self.full_arena_bytes)

    @property
    def need_bytes(self) -> int:
        """Return the minimum memory of this process, a whole number of MiB."""
        return self._need(self.process_bytes)

    @property
    def _left_bytes(self) -> int:
        """Return the bytes that are left for the arena while no prompt runs."""
        return self.memory_bytes - self.need_bytes + self.min_arena_bytes + self.spare_bytes

    def _need(self, process_bytes: int) -> int:
        parts = (self.dense_bytes, self.state_bytes, self.workspace_bytes, self.min_arena_bytes)
        return math.ceil((process_bytes + sum(parts)) / (1 << 20)) << 20

    def borrowed_bytes(self, tokens: int) -> int:
        """Return the arena bytes that a prompt pass of `tokens` borrows."""
        chunks, chunk = -(-tokens // self.chunk_tokens), self.chunk_tokens
        need = self.spare_bytes * (min(tokens, chunk) - 1) // (chunk - 1) + (chunks - 1) * self.chunk_bytes
        return max(0, need - (self._left_bytes - self.arena_bytes))

    def with_arena(self, nbytes: int) -> Budget:
        """Return a budget with an arena of `nbytes`, from which a prompt of one chunk borrows nothing."""
        return replace(self, memory_bytes=nbytes + self.need_bytes - self.min_arena_bytes, spare_bytes=0)

    def check(self) -> None:
        """Raise DymoeError if the memory is below the minimum, which the message names."""
        if self.memory_bytes < self.floor_bytes:
            raise DymoeError(
                f"memory budget of {format_size(self.memory_bytes)} is too small for this bundle: "
                f"the least that works is --memory {self.floor_bytes >> 20}MiB"
            )


def pass_tokens(left: int, used_bytes: int, budget: Budget, batch_invariant: bool) -> int:
    """Return how many of the `left` tokens of a prompt the next pass runs, so that the prompt reads the fewest bytes.

    Each pass reads those of the prompt's `used_bytes` of experts that are not resident. A pass of more chunks borrows
    more memory from the arena, so fewer experts stay resident, and the evicted ones are read again after the prompt.

    Kernels that are not `batch_invariant` run one chunk per pass, because their results depend slightly on the number
    of rows in a call.
    """
    chunk = budget.chunk_tokens
    if not batch_invariant:
        return min(left, chunk)
    if left % chunk == 1 and left > 1:
        left -= 1  # a token alone in its chunk is computed differently, so it always gets a pass of its own

    def read_bytes(chunks: int) -> int:
        borrowed = budget.borrowed_bytes(chunks * chunk)
        return -(-left // (chunks * chunk)) * max(0, used_bytes - (budget.arena_bytes - borrowed)) + borrowed

    spare = max(0, budget.arena_bytes - budget.borrowed_bytes(chunk) - budget.min_arena_bytes)
    most = min(1 + spare // budget.chunk_bytes, -(-left // chunk))
    return min(left, chunk * min(range(1, most + 1), key=read_bytes))

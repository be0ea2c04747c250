"""What a bundle needs and reaches with how much memory, computed from compile.json: sizes and counts, nothing timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dymoe_compile.report.values import Json, numbers, points_of
from dymoe_runtime.tools.charts.numbers import finite


@dataclass(frozen=True)
class Memory:
    """Sizes of a bundle in bytes, and how often each of its experts is used, most used first."""

    floor_bytes: float
    context: int
    arena_bytes_at_floor: float
    full_arena_bytes: float
    expert_bytes: float  # all experts at the highest tier
    largest_bytes_per_token: float  # of all points
    experts_per_token: float  # over all layers
    uses: Sequence[float]  # of each expert of the model

    @staticmethod
    def of(findings: Json) -> Memory | None:
        """Return what compile.json says, or None if a figure is missing; older ones do not have them."""
        memory, storage, model = (findings.get(key) or {} for key in ("memory", "storage", "model"))
        layers = [row for layer in findings.get("layers") or [] if (row := numbers(layer.get("frequency")))]
        uses = sorted((use for row in layers for use in row if use is not None and use >= 0), reverse=True)
        sizes = [size for p in points_of(findings) if (size := finite(p.get("bytes_per_token")))]
        figures = (
            memory.get("floor_bytes"),
            memory.get("arena_bytes_at_floor"),
            memory.get("full_arena_bytes"),
            storage.get("expert_bytes"),
            model.get("top_k"),
        )
        known = [value for figure in figures if (value := finite(figure)) is not None and value > 0]
        if len(known) < len(figures) or not sizes or not sum(uses):
            return None
        floor, at_floor, full, experts, top_k = known
        context = int(finite(memory.get("context")) or 0)
        return Memory(floor, context, at_floor, full, experts, max(sizes), top_k * len(layers), uses)

    def arena_bytes(self, memory_bytes: float) -> float:
        """Return the memory for experts within `memory_bytes` for the whole process."""
        return min(self.full_arena_bytes, self.arena_bytes_at_floor + memory_bytes - self.floor_bytes)

    def needed_bytes(self, bytes_per_token: float) -> float:
        """Return the memory from which all experts fit at the mean size of a point, as `--point auto` reckons."""
        arena = self.expert_bytes * bytes_per_token / self.largest_bytes_per_token
        return max(self.floor_bytes, self.floor_bytes + arena - self.arena_bytes_at_floor)

    def hits(self, memory_bytes: float, bytes_per_token: float) -> float:
        """Return the share of a token's experts that are in memory if the experts used most are kept.

        Every expert is taken to have the mean size of an active one, as `dymoe-run probe` does.
        """
        kept = int(self.arena_bytes(memory_bytes) * self.experts_per_token / bytes_per_token)
        return sum(self.uses[:kept]) / sum(self.uses)

    def read_bytes(self, memory_bytes: float, bytes_per_token: float) -> float:
        """Return the expected bytes that decoding a token reads from the disk."""
        if memory_bytes >= self.needed_bytes(bytes_per_token):
            return 0.0
        return bytes_per_token * (1 - self.hits(memory_bytes, bytes_per_token))

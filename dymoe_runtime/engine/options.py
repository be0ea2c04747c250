"""The options of a run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.process import MAX_THREADS
from dymoe_runtime.spec import KV_BITS
from dymoe_runtime.store import DECAY, EVICTIONS

# Smallest context in tokens: one of a prompt and one of an answer.
MIN_CONTEXT = 2
# Largest factor per token by which newer uses of experts count more.
MAX_DECAY = 100

_WHOLE_NUMBERS = ("memory_bytes", "uncounted_bytes", "arena_bytes", "context", "kv_bits", "tier", "threads")

# Prefix of the name of a uniform setting, before its bits.
TIER = "tier "
# Suffix of the name of a point that runs with the same thresholds in all layers.
NO_DEPTH = " without depth"


def label_of(name: str) -> str:
    """Return the label of a point or tier in messages, such as 'tier 4' or 'point 3'."""
    return name if name.startswith(TIER) else f"point {name}"


def options_for(name: str) -> str:
    """Return the options of `dymoe-run` that run a point or tier, such as '--tiers 4' or '--point 3'."""
    if name.startswith(TIER):
        return f"--tiers {name.removeprefix(TIER)}"
    depth = " --no-depth" if name.endswith(NO_DEPTH) else ""
    return f"--point {name.removesuffix(NO_DEPTH)}{depth}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class RunOptions:
    """How to run a bundle; None means the measured or detected default."""

    memory_bytes: int | None = None  # budget of the whole process
    count_program: bool = True  # whether it includes what the program held before it loaded the model
    uncounted_bytes: int = 0  # resident bytes of the process that do not count towards the budget
    arena_bytes: int | None = None  # size of the expert arena, whatever the budget leaves for it
    context: int | None = None  # tokens
    kv_bits: int = 16
    point: str | None = None  # name or mean bits of an operating point, or auto; None is the policy's default
    quality: float | None = None  # run the smallest point with at most this KL
    tier: int | None = None  # run every expert at this tier
    threads: int | None = None
    pin_threads: bool = False
    trace: Path | None = None  # write what every layer does to this file
    decisions: Path | None = None  # follow the tiers of this trace
    decay: float = DECAY  # factor per token by which newer uses of experts count more
    eviction: str = EVICTIONS[0]
    overlap: bool = True  # compute experts while others are read
    preload: bool = True  # start reading likely experts before anything else is loaded
    warm_set: Path | None = None  # file of expert uses, read at the start and replaced at the end
    latency: bool = False  # do not wait for the upper planes of experts below the highest tier
    prefetch: bool = True
    dynamic: bool = True  # choose tiers by importance
    depth: bool = True  # use the thresholds of each layer, not their mean

    def __post_init__(self) -> None:
        """Make paths of strings; raise DymoeError if a value is not possible with any bundle."""
        for name in ("trace", "decisions", "warm_set"):
            path = getattr(self, name)
            if path is not None and not isinstance(path, str | os.PathLike):
                raise DymoeError(f"{name} {path!r}: expected the path of a file")
            if path is not None:
                object.__setattr__(self, name, Path(path))
        for name in _WHOLE_NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
                raise DymoeError(f"{name} {value!r}: expected a whole number")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise DymoeError(f"--threads {self.threads}: expected 1 to {MAX_THREADS}")
        if self.kv_bits not in KV_BITS:
            raise DymoeError(f"--kv-bits {self.kv_bits}: expected one of {', '.join(map(str, KV_BITS))}")
        if self.context is not None and self.context < MIN_CONTEXT:
            raise DymoeError(f"--context {self.context}: expected at least {MIN_CONTEXT} tokens")
        if self.eviction not in EVICTIONS:
            raise DymoeError(f"--eviction {self.eviction}: expected one of {', '.join(EVICTIONS)}")
        if not _is_number(self.decay) or not 1 <= self.decay <= MAX_DECAY:
            raise DymoeError(f"--decay {self.decay}: expected a factor from 1 to {MAX_DECAY}")
        if self.quality is not None and (not _is_number(self.quality) or not 0 < self.quality < math.inf):
            raise DymoeError(f"--quality {self.quality}: expected a KL above 0")
        if self.point is not None and not isinstance(self.point, str):
            raise DymoeError(f"--point {self.point!r}: expected a text, such as '3.25' or 'auto'")
        if sum(value is not None for value in (self.point, self.quality, self.tier)) > 1:
            raise DymoeError("--point, --quality and --tiers exclude each other; give one")

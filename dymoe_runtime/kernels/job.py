"""The work of one expert in a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dymoe_runtime.tiers import RecordLayout


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert at one tier, ready for calls of `moe` as long as its segments stay where they are."""

    layout: RecordLayout
    tier: int
    segments: Sequence[np.ndarray]
    views: Any = None  # what the compiled kernels look up in them once


class Job(NamedTuple):
    """An expert for rows [first, first + rows) of a call."""

    expert: Expert
    first: int
    rows: int

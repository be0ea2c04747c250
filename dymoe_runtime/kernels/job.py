"""The work of one expert in a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Job(NamedTuple):
    """One expert at one tier, for rows [first, first + rows) of a call."""

    tier: int
    segments: Sequence[torch.Tensor]
    first: int
    rows: int

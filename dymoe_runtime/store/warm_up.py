"""Expected uses of the experts before the first token, and the order in which to preload them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.errors import DymoeError, remedy_of
from dymoe_runtime.files import MAX_JSON_BYTES, parse_json, read_regular, replacing, strict
from dymoe_runtime.spec import ExpertKey, Factor
from dymoe_runtime.store import DECAY, EVICTIONS
from dymoe_runtime.store.eviction import Eviction
from dymoe_runtime.store.request import ExpertRequest

# The expected uses count as those of this many tokens.
PRIOR_TOKENS = 100
# Share of the arena that is preloaded; segments of several sizes do not fill it to the last byte.
FILLED = 0.94
# Fixed time of a read and transfer speed of a typical NVMe drive; only their relation matters.
READ_S, DISK_BYTES_PER_S = 1e-4, 1e9


@dataclass(frozen=True)
class _WarmSet:
    """The content of a warm set: uses per token, [layers][experts]."""

    uses: tuple[tuple[Factor, ...], ...]


class WarmUp:
    """The expected uses of the experts, from the last session's warm set or else from calibration."""

    def __init__(self, bundle: Bundle, path: Path | None = None) -> None:
        """Read the warm set at `path`, if there is one.

        Raises DymoeError if the file is not a warm set of this bundle, or its folder cannot be written to.
        """
        known = None if path is None else read_warm_set(path, bundle)
        self._bundle, self._path = bundle, path
        self._uses = expected_uses(bundle) if known is None else known

    def eviction(self, decay: float = DECAY, eviction: str = EVICTIONS[0]) -> Eviction:
        """Return an `Eviction` of the kind `eviction`, one of EVICTIONS, with the expected uses as its prior."""
        return make_eviction(self._bundle, decay, eviction, self._uses)

    def order(self, bits_mean: float, arena_bytes: int) -> list[ExpertRequest]:
        """Return what to preload into an arena, as `preload_order` does with the expected uses."""
        return preload_order(self._bundle, self._uses, bits_mean, arena_bytes)

    def write(self, uses: np.ndarray) -> None:
        """Write `uses` per token, [layers, experts], as the new warm set, if there is a path for one."""
        if self._path is not None:
            write_warm_set(self._path, uses)


def expected_uses(bundle: Bundle) -> np.ndarray:
    """Return the uses of each expert per token that calibration measured, [layers, experts]."""
    uses = np.zeros((bundle.spec.num_layers, bundle.spec.num_experts))
    for layer in bundle.policy.layers:
        if layer.frequency:
            uses[layer.layer] = layer.frequency
    return uses


def make_eviction(
    bundle: Bundle, decay: float = DECAY, eviction: str = EVICTIONS[0], uses: np.ndarray | None = None
) -> Eviction:
    """Return an `Eviction` of the kind `eviction`, one of EVICTIONS, for a bundle.

    Its prior is `uses` per token, [layers, experts], by default those that calibration measured.
    """
    shape, segments = (bundle.spec.num_layers, bundle.spec.num_experts), len(bundle.layout.ladder)
    prior = expected_uses(bundle) if uses is None else uses
    worth = loss_without(bundle) if eviction == "by-cost" else None
    return Eviction(shape, segments, decay, prior, PRIOR_TOKENS, worth, per_layer=eviction == "per-layer")


def loss_without(bundle: Bundle) -> np.ndarray:
    """Return what it costs per byte to evict each segment, [layers, experts, segments]; only ratios matter.

    The cost is the KL of the layer at the lowest tier, times the expert's relative error at the tier without the
    segment (1 for the first segment), times the time to read the segment again, divided by its bytes.
    """
    spans, ladder = np.asarray(bundle.layout.segment_spans), bundle.layout.ladder
    loss = np.ones((bundle.spec.num_layers, bundle.spec.num_experts, len(ladder)))
    for layer in bundle.policy.layers:
        if not layer.frequency:
            continue
        lowest = max(layer.sensitivity.get(str(ladder[0]), 0.0), 1e-6)
        for segment in range(1, len(ladder)):
            error = np.asarray(layer.expert_error[str(ladder[segment - 1])])
            loss[layer.layer, :, segment] = np.clip(np.nan_to_num(error, nan=1.0), 1e-6, 1.0)
        loss[layer.layer] *= lowest
    by_byte: np.ndarray = loss * (READ_S + spans / DISK_BYTES_PER_S) / spans
    return by_byte


def preload_order(bundle: Bundle, uses: np.ndarray, bits_mean: float, arena_bytes: int) -> list[ExpertRequest]:
    """Return requests for the segments with the most expected uses, as many as fit, in the order of the file.

    They fill at most the share FILLED of the arena. `uses` is [layers, experts] per token.
    """
    ladder, spans = bundle.layout.ladder, bundle.layout.segment_spans
    density = uses[:, :, None] * np.asarray(shares_of_segments(ladder, bits_mean))
    order = np.argsort(-density, axis=None, kind="stable")
    sizes = np.asarray(spans)[order % len(spans)]
    fit = order[(np.cumsum(sizes) <= FILLED * arena_bytes) & (density.reshape(-1)[order] > 0)]
    tiers: dict[ExpertKey, int] = {}
    for index in fit.tolist():
        expert, segment = divmod(index, len(spans))
        # Lower segments have at least as many uses, so they come first in the stable order.
        tiers[ExpertKey(*divmod(expert, uses.shape[1]))] = ladder[segment]
    return [ExpertRequest(key, tiers[key]) for key in sorted(tiers)]


def shares_of_segments(ladder: Sequence[int], bits_mean: float) -> list[float]:
    """Return about which share of an expert's uses needs each segment, if their mean tier is `bits_mean`.

    If it is a tier of the ladder, all uses have that tier. Else they are taken to be halfway between uses of the two
    tiers around it and uses of the lowest and the highest tier.
    """
    if bits_mean in ladder:
        return [float(tier <= bits_mean) for tier in ladder]
    lowest, highest = ladder[0], ladder[-1]
    of_ends = _between(lowest, highest, bits_mean)
    return [1.0, *((of_ends + _between(below, tier, bits_mean)) / 2 for below, tier in itertools.pairwise(ladder))]


def _between(lower: float, upper: float, value: float) -> float:
    """Return how far a value is from `lower` to `upper`, within 0 and 1."""
    return min(max((value - lower) / (upper - lower), 0.0), 1.0)


def read_warm_set(path: Path, bundle: Bundle) -> np.ndarray | None:
    """Return the uses per token in the last session, [layers, experts], or None if the file does not exist yet.

    Raises DymoeError if the file is not a warm set of this bundle, or its folder cannot be written to.
    """
    if not os.access(path.parent, os.W_OK):
        raise DymoeError(f"{path}: a warm set cannot be written there; give --warm-set a folder that can be written to")
    remedy = "delete it, and the next run makes a new one"
    if not path.exists():
        return None
    values = parse_json(read_regular(path, remedy, MAX_JSON_BYTES), str(path), remedy)
    kept = strict(_WarmSet, values, f"{path}: not a warm set", remedy)
    shape = bundle.spec.num_layers, bundle.spec.num_experts
    if len(kept.uses) != shape[0] or any(len(row) != shape[1] for row in kept.uses):
        raise DymoeError(f"{path}: not a warm set of this bundle; {remedy}")
    return np.minimum(np.array(kept.uses, np.float64), 1.0)


def write_warm_set(path: Path, uses: np.ndarray) -> None:
    """Replace the file by one with `uses` per token, [layers, experts]; raise DymoeError if it cannot be written."""
    try:
        with replacing(path) as file:
            file.write((json.dumps({"uses": np.round(uses, 5).tolist()}) + "\n").encode())
    except OSError as error:
        raise DymoeError(
            f"{path}: the warm set cannot be written ({error.strerror}); "
            f"{remedy_of(error, 'choose another place')}, or leave --warm-set out"
        ) from error

"""Before anything was used: how often each expert is expected, and which to read first."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dymoe_runtime.bundle import Bundle
from dymoe_runtime.delivery import Want
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.eviction import EVICTIONS, GROWTH, Eviction
from dymoe_runtime.files import parse_json
from dymoe_runtime.spec import ExpertKey

# So many tokens' uses the expectation counts for.
PRIOR_TOKENS = 100
# Share of the arena that is filled ahead; segments of several sizes do not fill it to the last byte.
FILLED = 0.94
# What a read costs beyond its bytes, and how fast those are: of an NVMe drive, where it only matters how they compare.
READ_S, DISK_BYTES_PER_S = 1e-4, 1e9


def expected_uses(bundle: Bundle) -> np.ndarray:
    """Uses of each expert per token as calibration saw them, [layers, experts]."""
    uses = np.zeros((bundle.spec.num_layers, bundle.spec.num_experts))
    for layer in bundle.policy.layers:
        if layer.frequency:
            uses[layer.layer] = layer.frequency
    return uses


def make_eviction(
    bundle: Bundle, growth: float = GROWTH, eviction: str = EVICTIONS[0], uses: np.ndarray | None = None
) -> Eviction:
    """One of EVICTIONS for a bundle, starting from `uses` per token, else from what calibration saw."""
    shape, segments = (bundle.spec.num_layers, bundle.spec.num_experts), len(bundle.layout.ladder)
    prior = expected_uses(bundle) if uses is None else uses
    worth = loss_without(bundle) if eviction == "by-cost" else None
    return Eviction(shape, segments, growth, prior, PRIOR_TOKENS, worth, per_layer=eviction == "per-layer")


def loss_without(bundle: Bundle) -> np.ndarray:
    """What doing without a segment costs: KL of its layer at less bits, by the time to read each byte again.

    [layers, experts, segments]; only how values compare means anything.
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
    return loss * (READ_S + spans / DISK_BYTES_PER_S) / spans


def preload_order(bundle: Bundle, uses: np.ndarray, bits_mean: float, arena_bytes: int) -> list[Want]:
    """What to read first: the segments that are used most per byte, as many as fit, in the order of the file."""
    ladder, spans = bundle.layout.ladder, bundle.layout.segment_spans
    density = uses[:, :, None] * np.asarray(shares_of_segments(ladder, bits_mean))
    order = np.argsort(-density, axis=None, kind="stable")
    sizes = np.asarray(spans)[order % len(spans)]
    fit = order[(np.cumsum(sizes) <= FILLED * arena_bytes) & (density.reshape(-1)[order] > 0)]
    tiers: dict[ExpertKey, int] = {}
    for index in fit.tolist():
        expert, segment = divmod(index, len(spans))
        # Lower segments are used at least as often, and come first.
        tiers[ExpertKey(*divmod(expert, uses.shape[1]))] = ladder[segment]
    return [Want(key, tiers[key]) for key in sorted(tiers)]


def shares_of_segments(ladder: Sequence[int], bits_mean: float) -> list[float]:
    """About which share of an expert's uses needs each of its segments, where they have so many bits in the mean."""
    shares = [1.0]
    for below, tier in itertools.pairwise(ladder):
        shares.append(min(max((bits_mean - below) / (tier - below), 0.0), 1.0))
    return shares


def read_warm_set(path: Path, bundle: Bundle) -> np.ndarray | None:
    """Uses per token in the last session, [layers, experts]; None if there is no such file yet, but can be."""
    if not os.access(path.parent, os.W_OK):
        raise DymoeError(f"{path}: a warm set cannot be written there; give --warm-set a folder that can be written to")
    remedy = "delete it, and the next run makes a new one"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    values = parse_json(text, str(path), remedy)
    try:
        uses = np.asarray(values["uses"], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise DymoeError(f"{path}: not a warm set ({error!r}); {remedy}") from error
    if uses.shape != (bundle.spec.num_layers, bundle.spec.num_experts) or not (uses >= 0).all():
        raise DymoeError(f"{path}: not a warm set of this bundle; {remedy}")
    return np.minimum(uses, 1.0)


def write_warm_set(path: Path, uses: np.ndarray) -> None:
    """Replace the file by these uses per token, [layers, experts]."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps({"uses": np.round(uses, 5).tolist()}) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise DymoeError(
            f"{path}: the warm set cannot be written ({error.strerror}); free some space, or leave --warm-set out"
        ) from error
    finally:
        partial.unlink(missing_ok=True)

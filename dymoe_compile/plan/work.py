"""The work of a compilation: the mean bits that operating points aim at, and how long measuring them takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dymoe_compile.plan.sizes import FEWER_BITS
from dymoe_runtime.bundle.bundle import dense_kind
from dymoe_runtime.bundle.tiers import MXFP4, TRELLIS
from dymoe_runtime.spec import ModelSpec

# Step between the mean bits that mixed operating points aim at.
POINT_STEP = 0.25
# Held-out tokens for the many runs of sensitivity, and for the runs of the candidates. A large model gets fewer:
# tokens times active expert weights stay within MAX_WORK, but at least MIN_TOKENS are used. The rules that the
# fitted thresholds must beat are then measured at every other size only.
SENSITIVITY_TOKENS = 2048
CANDIDATE_TOKENS = 4096
MIN_TOKENS = 1024
MAX_WORK = 8e11
# Of the calibration tokens, those that are held out.
HELD_OUT_SHARE = 0.2
# Rules that are measured for each of `wanted_bits`: two that are fitted, and three that these must beat.
FITTED_RULES, OTHER_RULES = 2, 3
# What one thread with AVX-512 does in a second: expert weights that it quantizes, by the grid of their codes, and
# products of weights and tokens. They tell the order of magnitude.
QUANTIZED_PER_S = {TRELLIS: 2.1e6, "": 2.7e6, MXFP4: 2.7e6}
PRODUCTS_PER_S = 4.5e10
START_S = 10


def wanted_bits(ladder: Sequence[int]) -> list[float]:
    """Return the mean bits to aim at, between the lowest and the highest tier.

    One more value lies close to the lowest tier, where KL is steep. Returns [] for a ladder of one tier.
    """
    if len(ladder) == 1:
        return []
    count = round((ladder[-1] - ladder[0]) / POINT_STEP)
    return [ladder[0] + POINT_STEP / 2, *(ladder[0] + POINT_STEP * i for i in range(1, count))]


def active_weights(spec: ModelSpec) -> int:
    """Return the number of routed expert weights that a token uses."""
    per_expert = sum(rows * cols for rows, cols in spec.expert_shapes.values())
    return len(spec.moe_layers) * spec.top_k * per_expert


def measured_tokens(spec: ModelSpec, held_out: float, tokens: int) -> float:
    """Return how many of the `held_out` tokens are measured where `tokens` would do for a small model."""
    return min(held_out, tokens, max(MIN_TOKENS, MAX_WORK / active_weights(spec)))


def compile_seconds(spec: ModelSpec, ladder: tuple[int, ...], tokens: int, threads: int) -> float:
    """Return an estimate of the seconds that compiling takes with `tokens` of calibration text."""
    held_out, bits = HELD_OUT_SHARE * tokens, len(wanted_bits(ladder))
    sensitivity = 1 + len(spec.moe_layers) * (len(ladder) - 1) / 2  # each shares the layers before its own
    every = 1 if CANDIDATE_TOKENS * active_weights(spec) <= MAX_WORK else 2
    candidates = len(ladder) + bits * FITTED_RULES + math.ceil(bits / every) * OTHER_RULES
    kinds = {dense_kind(name, shape) for name, shape in spec.each_tensor()} - {None}
    choosing = len(ladder) + len(kinds) * len(FEWER_BITS)  # bits of dense weights
    passes = (sensitivity + choosing) * measured_tokens(spec, held_out, SENSITIVITY_TOKENS)
    passes += (candidates + len(ladder) + bits) * measured_tokens(spec, held_out, CANDIDATE_TOKENS)
    dense = sum(math.prod(shape) for name, shape in spec.each_tensor() if dense_kind(name, shape))
    products = (tokens + passes) * (active_weights(spec) + dense)
    quantizing = spec.expert_weights / QUANTIZED_PER_S[spec.expert_grid]
    return START_S + (quantizing + products / PRODUCTS_PER_S) / threads

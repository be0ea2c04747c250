"""The plan of a compilation: whether devices can run its bundle, how large it is, and how fast they should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dymoe_compile.job.device import profile_budget
from dymoe_compile.job.profile import AUTO, Profile, effective_bits_fit
from dymoe_compile.plan.sizes import FEWER_BITS, MAX_BITS, alike, disk_bytes, planned_bundle, total_bytes
from dymoe_compile.plan.source import Source
from dymoe_compile.plan.work import compile_seconds, wanted_bits
from dymoe_runtime.bundle.bundle import DENSE, Bundle
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.tools.machine.rates import Rates, Work, mean_bytes
from dymoe_runtime.units import format_size

VERSION = 1
# Tokens of the prompt for which the time to the first token is predicted.
PROMPT_TOKENS = 512
# Mean bits of the default point where no point's experts fit the memory.
USUAL_BITS = 3


@dataclass(frozen=True)
class Wanted:
    """What is to be compiled; `ladder` and `dense_bits` are None where each profile has its own."""

    ladder: tuple[int, ...] | None
    dense_bits: int | str | None
    calibration_tokens: int
    threads: int  # of this machine, to compile with


@dataclass(frozen=True)
class Point:
    """An operating point that the compiler will measure.

    `fits` is the rule by which the compiler chooses the default point; `resident` tells whether a run has memory for
    all experts beside its context and its work.
    """

    name: str
    bits: float
    fits: bool
    resident: bool


def make_plan(source: Source, profiles: Sequence[Profile], wanted: Wanted, kernels: Kernels) -> dict[str, Any]:
    """Return the plan as docs/schemas/plan.schema.json describes it."""
    spec = source.spec
    drafts = Drafts(source)
    return {
        "version": VERSION,
        "model": {
            "model_type": spec.model_type,
            "basis": source.basis,
            "layers": spec.num_layers,
            "moe_layers": len(spec.moe_layers),
            "experts_per_layer": spec.num_experts,
            "experts_per_token": spec.top_k,
            "expert_weights": spec.expert_weights,
            "checkpoint_bytes": source.checkpoint_bytes,
        },
        "prompt_tokens": prompt_tokens(source),
        "compile_threads": wanted.threads,
        "profiles": [for_profile(drafts, profile, wanted, kernels) for profile in profiles],
    }


def prompt_tokens(source: Source) -> int:
    """Return the tokens of the prompt for which the time to the first token is predicted."""
    return max(1, min(PROMPT_TOKENS, source.spec.max_context // 2))


@dataclass(frozen=True)
class Draft:
    """A planned bundle, the bytes of its files, and the work of its tokens."""

    bundle: Bundle
    nbytes: int
    work: Work


class Drafts:
    """Drafts of a model, each made once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._made: dict[tuple[tuple[int, ...], int], Draft] = {}

    def of(self, ladder: tuple[int, ...], dense_bits: int) -> Draft:
        """Return the draft with these tiers, and with these bits of all other weights."""
        if (ladder, dense_bits) not in self._made:
            spec = self.source.spec_for(ladder)
            bundle = planned_bundle(spec, ladder, alike(spec, dense_bits), self.source.tokenizer_bytes)
            self._made[ladder, dense_bits] = Draft(bundle, total_bytes(bundle), Work.of(bundle))
        return self._made[ladder, dense_bits]


def for_profile(drafts: Drafts, profile: Profile, wanted: Wanted, kernels: Kernels) -> dict[str, Any]:
    """Return the part of a plan for one profile."""
    ladder = wanted.ladder or profile.ladder
    asked = profile.dense_bits if wanted.dense_bits is None else wanted.dense_bits
    draft, budget = planned_for(drafts, ladder, asked, profile, kernels)
    bundle, total, dense = draft.bundle, draft.nbytes, draft.bundle.manifest.files[DENSE].nbytes
    # The compiler leaves a margin for the process; a run has what it does not take.
    run = replace(budget, process_bytes=budget.floor_process_bytes)
    points = points_of(bundle, profile, run.arena_bytes)
    fits, tokens = budget.floor_bytes <= profile.memory_bytes, wanted.calibration_tokens
    first = prompt_tokens(drafts.source)
    return {
        "name": profile.name,
        "memory_bytes": profile.memory_bytes,
        "floor_bytes": budget.floor_bytes,
        "fits": fits,
        "why": why(bundle, run, profile, points),
        "bundle_bytes": total,
        "dense_bytes": dense,
        "tier_bytes": {
            str(tier): span * bundle.spec.total_experts
            for tier, span in zip(ladder, bundle.layout.segment_spans, strict=True)
        },
        "other_bytes": total - dense - bundle.expert_bytes(),
        "dense_bits": next(iter(bundle.manifest.dense_bits.values())),
        "dense_bits_may_change": asked == AUTO and (len(ladder) > 1 or budget.arena_bytes < budget.full_arena_bytes),
        "disk_bytes": disk_bytes(bundle.spec, ladder, asked, tokens),
        "compile_seconds": round(compile_seconds(bundle.spec, ladder, tokens, wanted.threads)),
        "default_point": default_point(points).name if fits else None,
        "points": [_predicted(point, draft.work, profile.rates, run, first) for point in points] if fits else [],
    }


def planned_for(
    drafts: Drafts, ladder: tuple[int, ...], dense_bits: int | str, profile: Profile, kernels: Kernels
) -> tuple[Draft, Budget]:
    """Return the draft of the bundle that compiling for a device should make, and the division of the device's memory.

    With AUTO the compiler measures what fewer bits of dense weights cost, which only compiling can tell; this has the
    most bits with which the model runs.
    """
    for bits in (MAX_BITS, *FEWER_BITS) if dense_bits == AUTO else (int(dense_bits),):
        draft = drafts.of(ladder, bits)
        budget = profile_budget(draft.bundle, profile, kernels)
        if budget.floor_bytes <= profile.memory_bytes:
            break
    return draft, budget


def points_of(bundle: Bundle, profile: Profile, arena_bytes: int) -> list[Point]:
    """Return the points that the compiler will measure, by rising bits; it keeps those that no other beats."""
    ladder = bundle.manifest.ladder
    effective = [bundle.layout.bits_per_weight(tier) for tier in ladder]
    named = [(f"uniform-{tier}", float(tier)) for tier in ladder] + [
        (f"{bits:g}", bits) for bits in wanted_bits(ladder)
    ]
    return [
        Point(
            name,
            bits,
            effective_bits_fit(float(np.interp(bits, ladder, effective)), bundle, profile),
            mean_bytes(bundle.layout, bits) * bundle.spec.total_experts <= arena_bytes,
        )
        for name, bits in sorted(named, key=lambda point: (point[1], point[0]))
    ]


def default_point(points: Sequence[Point]) -> Point:
    """Return the mixed point of most bits whose experts fit the memory, else the one nearest USUAL_BITS."""
    mixed = [point for point in points if not point.name.startswith("uniform")] or list(points)
    fitting = [point for point in mixed if point.fits]
    return fitting[-1] if fitting else min(mixed, key=lambda point: abs(point.bits - USUAL_BITS))


def why(bundle: Bundle, budget: Budget, profile: Profile, points: Sequence[Point]) -> str:
    """Return the reason why a bundle fits a device, how well, or why it does not."""
    if budget.floor_bytes > profile.memory_bytes:
        bits = next(iter(bundle.manifest.dense_bits.values()))
        parts = f"{format_size(budget.dense_bytes)} for dense weights at {bits} bits"
        if budget.state_bytes > budget.dense_bytes:
            parts = f"{format_size(budget.state_bytes)} for the context"
        return (
            f"needs {format_size(budget.floor_bytes)}, {parts} among them, has {format_size(profile.memory_bytes)}; "
            "a larger device runs it"
        )
    resident = [point for point in points if point.resident]
    if resident == list(points):
        return "all experts stay in memory at every point"
    if resident:
        return f"all experts stay in memory up to point {resident[-1].name}; beyond, some are read from the disk"
    share = budget.arena_bytes / budget.full_arena_bytes
    return f"memory holds {share:.0%} of the experts' bytes, the others are read from the disk as they are needed"


def _predicted(point: Point, work: Work, rates: Rates | None, budget: Budget, tokens: int) -> dict[str, Any]:
    known = {"name": point.name, "bits_mean": point.bits, "all_resident": point.resident}
    if rates is None:
        return {**known, "resident_share": None, "tokens_per_s": None, "first_token_s": None}
    found = work.predict(rates, point.bits, budget.arena_bytes, tokens)
    return {
        **known,
        "resident_share": round(found.resident_share, 4),
        "tokens_per_s": float(f"{1 / found.token_s:.3g}"),
        "first_token_s": float(f"{found.first_token_s:.3g}"),
    }

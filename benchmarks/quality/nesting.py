"""What nesting costs in KL and saves in bytes, against tiers stored separately by the same method.

    python benchmarks/quality/nesting.py BUNDLE MODEL --calibration TEXT... --held-out TEXT...

KL is simulated for both, with the bundle's own dense weights and 8 bits for the inputs of experts. Bytes read are those
of an LRU cache of three sizes that replays the routing of the held-out text token by token, at each point.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from common import (
    HeldOut,
    Simulated,
    calibration_moments,
    calibration_windows,
    choose_tiers,
    emitted_rules,
    held_out,
    interval_of_ratio,
    kl,
    markdown,
    per_window,
    quantized,
    through_layers,
    uniform,
)

from dymoe_compile.checkpoint.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.checkpoint.original import CheckpointExperts
from dymoe_compile.checkpoint.window_decoder import window_decoder
from dymoe_compile.policy.sensitivity import Rule
from dymoe_compile.quantize import load_descent
from dymoe_compile.quantize.descent import DescentKernels
from dymoe_compile.quantize.moments import Moments
from dymoe_compile.quantize.quantize import quantize_matrix
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.tiers import BLOCK, levels_at, make_layout, tier_scales
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.routing import Routing

CACHE_SHARES = (0.125, 0.25, 0.5)

# (layer, expert, tier) in the order in which they are needed
Trace = list[tuple[int, int, int]]


@click.command()
@click.argument("bundle_path", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--calibration", multiple=True, required=True)
@click.option("--held-out", "texts", multiple=True, required=True)
@click.option("--bytes", "nbytes", default=20000, show_default=True, help="Of each held-out text.")
def main(bundle_path: Path, model: Path, calibration: tuple[str, ...], texts: tuple[str, ...], nbytes: int) -> None:
    """Print what nesting costs in KL, and what it saves in bytes read."""
    bundle, kernels = Bundle.open(bundle_path), load_kernels()
    judged = held_out(model, texts, nbytes, kernels)
    found = calibration_moments(model, calibration_windows(bundle, model, calibration), kernels)
    print(quality(bundle, model, found, judged, kernels))
    print()
    print(reads(bundle, model, judged, kernels))


def quality(
    bundle: Bundle, model: Path, found: list[dict[str, list[Moments]]], judged: HeldOut, kernels: Kernels
) -> str:
    """Return a table of the KL of nested and of separate tiers."""
    ladder, grid, descent = bundle.manifest.ladder, bundle.spec.expert_grid, load_descent(kernels)

    def alone(weight: torch.Tensor, m: Moments, tier: int) -> torch.Tensor:
        return values(weight, m, (tier,), tier, descent, grid)

    def together(weight: torch.Tensor, m: Moments, tier: int) -> torch.Tensor:
        return values(weight, m, ladder, tier, descent, grid)

    models = []
    for method in (together, alone):
        experts = {t: quantized(model, lambda w, m, f=method, t=t: f(w, m, t), found) for t in ladder}
        models.append(Simulated(bundle, experts, kernels))
    cases: dict[str, Rule] = {f"uniform {tier}": uniform(bundle, tier) for tier in ladder}
    mixed = {point.name for point in bundle.policy.points if point.kind == "mixed"}
    cases |= {f"point {name}": rule for name, rule in emitted_rules(bundle).items() if name in mixed}
    rows = []
    for name, rule in cases.items():
        nested, separate = (simulated.measure(rule, judged) for simulated in models)
        low, high = interval_of_ratio(per_window(nested), per_window(separate))
        more = kl(nested) / kl(separate) - 1
        rows.append(
            [name, f"{kl(nested):.4f}", f"{kl(separate):.4f}", f"{more:+.0%} ({low - 1:+.0%} to {high - 1:+.0%})"]
        )
    both = sum(bundle.layout.bits_per_weight(tier) for tier in ladder)
    rows.append(["bits on disk", f"{bundle.layout.bits_per_weight(ladder[-1]):.2f}", f"{both:.2f}", ""])
    return markdown(["", "nested KL", "separate KL", "nested costs"], rows)


def values(
    weight: torch.Tensor, found: Moments, ladder: tuple[int, ...], tier: int, descent: DescentKernels, grid: str
) -> torch.Tensor:
    """Return a matrix at `tier`, quantized for `ladder` on `grid`."""
    top = ladder[-1]
    matrix = quantize_matrix(weight, ladder, descent, found, grid)
    levels = levels_at(matrix.codes >> (top - tier), tier, top, grid)
    scales = tier_scales(matrix.scale_indices[tier], matrix.multiplier, tier, top, grid)
    return torch.from_numpy(scales.repeat(BLOCK, axis=1)[:, : weight.shape[1]] * levels)


def reads(bundle: Bundle, model: Path, judged: HeldOut, kernels: Kernels) -> str:
    """Return a table of MB read per token, nested and separate, at each point and cache size."""
    layout, ladder = bundle.layout, bundle.manifest.ladder
    separate = {t: make_layout(bundle.spec.expert_shapes, (t,)).record_bytes for t in ladder}
    nested = {t: layout.prefix_bytes(t) for t in ladder}
    rows = []
    for name, rule in emitted_rules(bundle).items():
        trace, tokens = record(model, rule, judged, kernels)
        row: list[object] = [name]
        for share in CACHE_SHARES:
            cache = int(share * bundle.expert_bytes())
            a = lru(trace, cache, nested, True) / tokens
            b = lru(trace, cache, separate, False) / tokens
            row.append(f"{a / 1e6:.3f} / {b / 1e6:.3f} ({a / b - 1:+.0%})" if b else "0 / 0")
        rows.append(row)
    header = ["MB per token, nested / separate", *(f"cache {share:.1%} of the bundle" for share in CACHE_SHARES)]
    return markdown(header, rows)


def record(model: Path, rule: Rule, judged: HeldOut, kernels: Kernels) -> tuple[Trace, int]:
    """Return what decoding some windows needs, token by token, and their number of tokens."""
    checkpoint = Checkpoint.open(model)
    original = CheckpointExperts(checkpoint)
    layers: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # experts and tiers of all tokens

    def recording(layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        layers[layer] = routing.experts, choose_tiers(rule, layer, routing)
        return original.decode(layer, h, routing)

    some = judged.ids[:: max(1, len(judged.ids) // 8)]
    through_layers(window_decoder(checkpoint.spec, CheckpointDense(checkpoint), kernels), some, recording)
    trace: Trace = []
    for token in range(some.size):
        for layer, (experts, tiers) in layers.items():
            pairs = zip(experts[token].tolist(), tiers[token].tolist(), strict=True)
            trace += [(layer, expert, tier) for expert, tier in pairs]
    return trace, some.size


def lru(trace: Sequence[tuple[int, int, int]], capacity: int, sizes: dict[int, int], nested: bool) -> int:
    """Return the bytes read with an LRU cache of `capacity` bytes; nested records grow by their missing planes."""
    held: OrderedDict[tuple[int, ...], int] = OrderedDict()
    used = total = 0
    for layer, expert, tier in trace:
        key = (layer, expert) if nested else (layer, expert, tier)
        have = held.pop(key, 0)
        need = max(have, sizes[tier])
        total += need - have
        used += need - have
        held[key] = need
        while used > capacity:
            used -= held.popitem(last=False)[1]
    return total


if __name__ == "__main__":
    main()

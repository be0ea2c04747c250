"""What nesting costs in KL and saves in bytes, against tiers stored separately by the same method.

    python benchmarks/quality/nesting.py BUNDLE MODEL --calibration TEXT... --held-out TEXT...

KL is simulated in float32 for both, beside the bundle's own dense weights. Bytes read are those of
an LRU cache of three sizes replaying the routing of the held-out text token by token, at each point.
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
    emitted_rules,
    held_out,
    interval_of_ratio,
    kl,
    load_windows,
    markdown,
    per_window,
    quantized,
    uniform,
)

from dymoe_compile.quantize import Moments, quantize_matrix
from dymoe_compile.reference import CheckpointExperts, open_reference
from dymoe_compile.sensitivity import Rule
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.decoder import Decoder, Routing
from dymoe_runtime.tiers import BLOCK, levels_of, make_layout, tier_scales

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
    bundle = Bundle.open(bundle_path)
    judged = held_out(model, texts, nbytes)
    windows, _ = load_windows(model, calibration, 1 << 30)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).numpy()
    tokens = int(bundle.manifest.provenance["calibration_tokens"])
    found = calibration_moments(model, windows[order[: tokens // windows.shape[1]]])
    print(quality(bundle, model, found, judged))
    print()
    print(reads(bundle, model, judged))


def quality(bundle: Bundle, model: Path, found: list[dict[str, list[Moments]]], judged: HeldOut) -> str:
    ladder = bundle.manifest.ladder

    def alone(weight: torch.Tensor, m: Moments, tier: int) -> torch.Tensor:
        return values(weight, m, (tier,), tier)

    def together(weight: torch.Tensor, m: Moments, tier: int) -> torch.Tensor:
        return values(weight, m, ladder, tier)

    models = []
    for method in (together, alone):
        experts = {t: quantized(model, lambda w, m, f=method, t=t: f(w, m, t), found) for t in ladder}
        models.append(Simulated(bundle, experts))
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


def values(weight: torch.Tensor, found: Moments, ladder: tuple[int, ...], tier: int) -> torch.Tensor:
    """The matrix at `tier`, quantized for `ladder`."""
    matrix = quantize_matrix(weight, ladder, found)
    levels = levels_of(tier, ladder[-1])[matrix.codes >> (ladder[-1] - tier)]
    scales = tier_scales(matrix.steps[tier], matrix.multiplier, tier, ladder[-1])
    return torch.from_numpy(scales.repeat(BLOCK, axis=1)[:, : weight.shape[1]] * levels)


def reads(bundle: Bundle, model: Path, judged: HeldOut) -> str:
    """MB read per token, nested and separate, at each point and cache size."""
    layout, ladder = bundle.layout, bundle.manifest.ladder
    separate = {t: make_layout(bundle.spec.expert_shapes, (t,)).record_bytes for t in ladder}
    nested = {t: layout.prefix_bytes(t) for t in ladder}
    rows = []
    for name, rule in emitted_rules(bundle).items():
        trace, tokens = record(model, rule, judged)
        row: list[object] = [name]
        for share in CACHE_SHARES:
            cache = int(share * bundle.expert_bytes())
            a = lru(trace, cache, nested, True) / tokens
            b = lru(trace, cache, separate, False) / tokens
            row.append(f"{a / 1e6:.3f} / {b / 1e6:.3f} ({a / b - 1:+.0%})" if b else "0 / 0")
        rows.append(row)
    header = ["MB per token, nested / separate", *(f"cache {share:.1%} of the bundle" for share in CACHE_SHARES)]
    return markdown(header, rows)


def record(model: Path, rule: Rule, judged: HeldOut) -> tuple[Trace, int]:
    """What decoding the first windows needs, token by token."""
    original = open_reference(model)
    experts = original.experts
    assert isinstance(experts, CheckpointExperts)
    steps: list[list[tuple[np.ndarray, np.ndarray]]] = []

    def recording(layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        steps[-1].append((routing.experts, rule.choose(layer, [routing])))
        return experts(layer, h, routing)

    decoder = Decoder(original.spec, original.dense, recording)
    trace: Trace = []
    some = judged.ids[:: max(1, len(judged.ids) // 8)]
    for ids in some:
        steps.append([])
        decoder.forward(ids)
        for token in range(len(ids)):
            for layer, (chosen, tiers) in zip(original.spec.moe_layers, steps[-1], strict=True):
                pairs = zip(chosen[token].tolist(), tiers[token].tolist(), strict=True)
                trace += [(layer, expert, tier) for expert, tier in pairs]
    return trace, some.size


def lru(trace: Sequence[tuple[int, int, int]], capacity: int, sizes: dict[int, int], nested: bool) -> int:
    """Bytes read with `capacity` bytes of least-recently-used cache; nested records grow by their missing planes."""
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

"""KL to the original and perplexity ratio at every size, for our points, baselines and peers.

    python benchmarks/quality/table.py BUNDLE MODEL --held-out TEXT... [--peers FILE]

BUNDLE was compiled from MODEL with other texts. FILE is what peers.py wrote of the same held-out texts. Points run on
the kernels; rounding to nearest (RTN) is simulated with the bundle's own dense weights, and 0.25 bits of metadata are
added. --report writes a page: the bundle's report with baselines and peers in its plot. A second table compares fitted
thresholds with uniform, static, flat and cosine ones at equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
from common import (
    HeldOut,
    Simulated,
    compared_rules,
    emitted_rules,
    held_out,
    interval_of_ratio,
    markdown,
    originals,
    per_window,
    row_header,
    row_of,
    rtn,
    score_original,
    uniform,
)

from dymoe_compile.checkpoint.window_decoder import bundle_decoder
from dymoe_compile.policy.sensitivity import Measurement, Measurer, Rule
from dymoe_compile.report.page import render
from dymoe_runtime.bundle.bundle import FINDINGS, Bundle
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.score import Score

BASELINE_METADATA = 0.25

Key = tuple[str, str]
K = TypeVar("K")


@click.command()
@click.argument("bundle_path", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--held-out", "texts", multiple=True, required=True)
@click.option("--bytes", "nbytes", default=60000, show_default=True, help="Of each held-out text.")
@click.option("--compare-bytes", default=15000, show_default=True, help="Of each, for the second table.")
@click.option("--peers", "peers_path", type=click.Path(path_type=Path))
@click.option("--report", type=click.Path(path_type=Path))
@click.option("--baselines/--no-baselines", default=True)
def main(
    bundle_path: Path,
    model: Path,
    texts: tuple[str, ...],
    nbytes: int,
    compare_bytes: int,
    peers_path: Path | None,
    report: Path | None,
    baselines: bool,
) -> None:
    """Print both tables, and write the report."""
    bundle, kernels = Bundle.open(bundle_path), load_kernels()
    judged = held_out(model, texts, nbytes, kernels)
    reference = score_original(judged)
    rows = []
    for name, result in measure(bundle, judged, emitted_rules(bundle), kernels).items():
        rows.append(row_of(f"point {name}", effective_bits(bundle, result), result.windows, judged, reference))
    peers = []
    if baselines:
        peers += baseline_rows(bundle, model, judged, reference, kernels)
    header = row_header(judged)
    peers += peer_rows(peers_path, header, texts, nbytes) if peers_path else []
    rows += peers
    if report:
        report.write_text(render(with_peers(bundle, peers)), encoding="utf-8")
    print(markdown(header, sorted(rows, key=lambda row: (float(str(row[1])), str(row[0])))))
    print()
    few = held_out(model, texts, compare_bytes, kernels)
    print(compare(bundle, measure(bundle, few, compared_rules(bundle), kernels)))


def measure(bundle: Bundle, judged: HeldOut, rules: dict[K, Rule], kernels: Kernels) -> dict[K, Measurement]:
    """Measure all rules on the kernels."""
    decoder = bundle_decoder(bundle, kernels)
    results = Measurer(bundle, judged.ids, judged.original, decoder, kernels).measure(list(rules.values()))
    return dict(zip(rules, results, strict=True))


def baseline_rows(
    bundle: Bundle, model: Path, judged: HeldOut, reference: Sequence[Score], kernels: Kernels
) -> list[list[object]]:
    """Return the rows of rounding to nearest at each number of bits."""
    rows = []
    for bits in (2, 3, 4):
        experts = [{n: torch.stack([rtn(w, bits) for w in stack[n]]) for n in stack} for _, stack in originals(model)]
        scores = Simulated(bundle, {bits: experts}, kernels).measure(uniform(bundle, bits), judged)
        rows.append(row_of(f"RTN {bits}", bits + BASELINE_METADATA, scores, judged, reference))
    return rows


def peer_rows(path: Path, header: Sequence[str], texts: Sequence[str], nbytes: int) -> list[list[object]]:
    """Return the rows that peers.py wrote, which must be of the same texts."""
    rows: list[list[object]] = []
    for line in path.read_text().splitlines():
        peer = json.loads(line)
        if peer["texts"] != [Path(text).stem for text in texts] or peer["bytes"] != nbytes:
            raise SystemExit(f"{path} is of {peer['bytes']} bytes of {', '.join(peer['texts'])}; give the same here")
        rows.append([peer["row"][column] for column in header])
    return rows


def with_peers(bundle: Bundle, rows: Sequence[Sequence[object]]) -> dict[str, Any]:
    """Return the findings of the bundle with these rows as its peers."""
    findings: dict[str, Any] = json.loads((bundle.path / FINDINGS).read_text())
    peers = [{"name": name, "effective_bits": float(str(bits)), "kl": float(str(kl))} for name, bits, kl, *_ in rows]
    return findings | {"peers": peers}


def effective_bits(bundle: Bundle, result: Measurement) -> float:
    """Return the mean bits per active expert weight, scales included."""
    return result.counts.mean(bundle.layout.bits_per_weight)


def compare(bundle: Bundle, measured: dict[Key, Measurement]) -> str:
    """Return the second table: dynamic thresholds against others, whose KL is interpolated at equal bytes."""
    ladder = bundle.manifest.ladder
    anchors = [(effective_bits(bundle, m), m) for (name, kind), m in measured.items() if kind == "uniform"]
    curves = {
        kind: sorted(
            [(effective_bits(bundle, m), m) for (_, k), m in measured.items() if k == kind]
            + [(bits, m) for bits, m in anchors if round(bits) in (ladder[0], ladder[-1]) or kind == "uniform"],
            key=lambda pair: pair[0],
        )
        for kind in ("uniform", "static", "flat", "cosine")
    }
    rows = []
    for (name, kind), result in measured.items():
        if kind != "mixed":
            continue
        bits, mine = effective_bits(bundle, result), per_window(result.windows)
        row: list[object] = [name, f"{bits:.2f}", f"{float(mine.mean()):.4f}"]
        for curve in curves.values():
            theirs = interpolate(curve, bits)
            less = 1 - float(mine.mean() / theirs.mean())
            low, high = interval_of_ratio(mine, theirs)
            row += [f"{float(theirs.mean()):.4f}", f"{less:.0%} ({1 - high:.0%} to {1 - low:.0%})"]
        rows.append(row)
    header = ["point", "bits", "fitted KL"]
    for kind in curves:
        header += [f"{kind} KL", "less"]
    return markdown(header, rows)


def interpolate(curve: Sequence[tuple[float, Measurement]], bits: float) -> np.ndarray:
    """Return the KL per window at `bits`, between the neighbours on the curve, linear in the logarithm."""
    below = max((pair for pair in curve if pair[0] <= bits + 1e-9), key=lambda pair: pair[0])
    above = min((pair for pair in curve if pair[0] >= bits - 1e-9), key=lambda pair: pair[0])
    share = (bits - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    low, high = (np.log(np.maximum(per_window(measured.windows), 1e-9)) for _, measured in (below, above))
    return np.exp(low * (1 - share) + high * share)


if __name__ == "__main__":
    main()

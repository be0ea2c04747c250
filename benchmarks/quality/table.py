"""KL to the original and perplexity ratio at every size, for our points, baselines and llama.cpp.

    python benchmarks/quality/table.py BUNDLE MODEL --calibration TEXT... --held-out TEXT... [--llama LOG]

BUNDLE was compiled from MODEL with these calibration texts; held-out texts are others. LOG has a line for
each type of llama.cpp's, TYPE imatrix no|yes bytes N PPL(Q)/PPL(base) : X … Mean KLD: Y, as llama-perplexity
--kl-divergence says of the same held-out bytes. Points run on the kernels; RTN and GPTQ are simulated in
float32 beside the bundle's own dense weights, with 0.25 bits of metadata.
--report writes the bundle's report with baselines and llama.cpp in its plot, as a page of its own.
A second table has fitted thresholds against uniform, static, flat and cosine ones at equal bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
from common import (
    HeldOut,
    Simulated,
    calibration_moments,
    compared_rules,
    emitted_rules,
    gptq,
    held_out,
    interval_of_ratio,
    kl,
    load_windows,
    log_softmax_nll,
    markdown,
    per_window,
    perplexity_ratio,
    quantized,
    rtn,
    uniform,
)

from dymoe_compile.quantize import Moments
from dymoe_compile.report import render
from dymoe_compile.sensitivity import Measurement, Measurer, Rule
from dymoe_runtime.bundle import FINDINGS, Bundle
from dymoe_runtime.evaluate import Score

# Bits per expert weight of llama.cpp's types, scales included.
LLAMA_BITS = {"IQ2_XS": 2.31, "Q2_K": 2.9, "IQ3_XXS": 3.06, "Q3_K_M": 3.6, "Q4_0": 4.5, "Q4_K_M": 4.5}
BASELINE_METADATA = 0.25

Key = tuple[str, str]
K = TypeVar("K")


@click.command()
@click.argument("bundle_path", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--calibration", multiple=True, required=True)
@click.option("--held-out", "texts", multiple=True, required=True)
@click.option("--bytes", "nbytes", default=60000, show_default=True, help="Of each held-out text.")
@click.option("--compare-bytes", default=15000, show_default=True, help="Of each, for the second table.")
@click.option("--llama", type=click.Path(path_type=Path))
@click.option("--report", type=click.Path(path_type=Path))
@click.option("--baselines/--no-baselines", default=True)
def main(
    bundle_path: Path,
    model: Path,
    calibration: tuple[str, ...],
    texts: tuple[str, ...],
    nbytes: int,
    compare_bytes: int,
    llama: Path | None,
    report: Path | None,
    baselines: bool,
) -> None:
    bundle = Bundle.open(bundle_path)
    judged = held_out(model, texts, nbytes)
    reference = log_softmax_nll(judged)
    rows = []
    for name, result in measure(bundle, judged, emitted_rules(bundle)).items():
        rows.append(row_of(f"point {name}", effective_bits(bundle, result), result.windows, judged, reference))
    peers = baseline_rows(bundle, model, calibration, judged, reference) if baselines else []
    peers += llama_rows(llama) if llama else []
    rows += peers
    if report:
        report.write_text(render(with_peers(bundle, peers)), encoding="utf-8")
    domains = sorted(set(judged.domains))
    header = ["", "bits", "KL", "PPL ratio", *(f"{d} {what}" for d in domains for what in ("KL", "PPL ratio"))]
    print(markdown(header, sorted(rows, key=lambda row: (float(str(row[1])), str(row[0])))))
    print()
    few = held_out(model, texts, compare_bytes)
    print(compare(bundle, measure(bundle, few, compared_rules(bundle))))


def measure(bundle: Bundle, judged: HeldOut, rules: dict[K, Rule]) -> dict[K, Measurement]:
    results = Measurer(bundle, judged.ids, judged.original).measure(list(rules.values()))
    return dict(zip(rules, results, strict=True))


def row_of(
    label: str, bits: float, scores: Sequence[Score], judged: HeldOut, reference: Sequence[Score]
) -> list[object]:
    row: list[object] = [label, f"{bits:.2f}", f"{kl(scores):.4f}", f"{perplexity_ratio(scores, reference):.4f}"]
    for domain in sorted(set(judged.domains)):
        mine = [i for i, d in enumerate(judged.domains) if d == domain]
        few, original = [scores[i] for i in mine], [reference[i] for i in mine]
        row += [f"{kl(few):.4f}", f"{perplexity_ratio(few, original):.4f}"]
    return row


def baseline_rows(
    bundle: Bundle, model: Path, calibration: Sequence[str], judged: HeldOut, reference: Sequence[Score]
) -> list[list[object]]:
    windows, _ = load_windows(model, calibration, 1 << 30)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).numpy()
    tokens = int(bundle.manifest.provenance["calibration_tokens"])
    found = calibration_moments(model, windows[order[: tokens // windows.shape[1]]])
    methods: dict[str, Callable[[torch.Tensor, Moments, int], torch.Tensor]] = {
        "RTN": lambda w, m, bits: rtn(w, bits),
        "GPTQ": gptq,
    }
    rows = []
    for name, method in methods.items():
        for bits in (2, 3, 4):
            experts = quantized(model, lambda w, m, method=method, bits=bits: method(w, m, bits), found)
            scores = Simulated(bundle, {bits: experts}).measure(uniform(bundle, bits), judged)
            rows.append(row_of(f"{name} {bits}", bits + BASELINE_METADATA, scores, judged, reference))
    return rows


def llama_rows(log: Path) -> list[list[object]]:
    """Rows from the lines of LOG, whose texts are judged as one."""
    rows: list[list[object]] = []
    for line in log.read_text().splitlines():
        found = re.match(r"(\S+) imatrix (no|yes) bytes .*PPL\(Q\)/PPL\(base\) : ([\d.]+).*Mean KLD: ([\d.]+)", line)
        if found:
            with_matrix = " imatrix" if found[2] == "yes" else ""
            label = f"llama.cpp {found[1]}{with_matrix}"
            rows.append([label, f"{LLAMA_BITS[found[1]]:.2f}", f"{float(found[4]):.4f}", f"{float(found[3]):.4f}"])
    return rows


def with_peers(bundle: Bundle, rows: Sequence[Sequence[object]]) -> dict[str, Any]:
    """The findings of the bundle, and what others do at their bits."""
    findings: dict[str, Any] = json.loads((bundle.path / FINDINGS).read_text())
    peers = [{"name": name, "effective_bits": float(str(bits)), "kl": float(str(kl))} for name, bits, kl, *_ in rows]
    return findings | {"peers": peers}


def effective_bits(bundle: Bundle, result: Measurement) -> float:
    pairs = sum(result.used.values())
    return sum(bundle.layout.bits_per_weight(tier) * count for tier, count in result.used.items()) / pairs


def compare(bundle: Bundle, measured: dict[Key, Measurement]) -> str:
    """Dynamic thresholds against others at the bytes of each; KL of uniform tiers is interpolated in its logarithm."""
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
    """KL per window at `bits`, between the neighbours on the curve, linear in the logarithm."""
    below = max((pair for pair in curve if pair[0] <= bits + 1e-9), key=lambda pair: pair[0])
    above = min((pair for pair in curve if pair[0] >= bits - 1e-9), key=lambda pair: pair[0])
    share = (bits - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    low, high = (np.log(np.maximum(per_window(measured.windows), 1e-9)) for _, measured in (below, above))
    return np.exp(low * (1 - share) + high * share)


if __name__ == "__main__":
    main()

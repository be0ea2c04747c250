"""Draw the pictures of docs/choosing.md from real runs.

    python benchmarks/pictures.py quality build/demo.dymoe docs/pictures/quality.svg
    python benchmarks/pictures.py memory BUNDLE docs/pictures/memory.svg --rounds 3

`quality` draws what the compiler measured of a bundle. `memory` times decoding at several budgets, each in a cgroup
with the budget and the margin that the runtime leaves, with an empty page cache, in interleaved rounds; it prints the
medians. It needs the right to make cgroups and to drop caches.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "streaming"))  # where budgets.py is

from budgets import limit_for, min_memory, result, run

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.tools.charts.markup import STYLE
from dymoe_runtime.tools.charts.plot import Figure, Frame, Point, Series, plot
from dymoe_runtime.tools.charts.scales import Axis

WIDE = Frame(width=640, height=320)
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("quality", "memory"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--tiers", default="4,3,2")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    figure = quality(Bundle.open(args.bundle)) if args.kind == "quality" else memory(args)
    args.svg.parent.mkdir(parents=True, exist_ok=True)
    args.svg.write_text(standalone(figure), encoding="utf-8")


def quality(bundle: Bundle) -> str:
    """Return the distance from the original model against the bits of an active expert."""
    points = [p for p in bundle.policy.points if p.kl is not None]
    points.sort(key=lambda p: p.bits_mean)
    mixed = [p for p in points if not p.name.startswith("uniform-")]
    uniform = [p for p in points if p.name.startswith("uniform-")]

    def marks(chosen: list, name: str) -> list[Point]:
        tips = [f"{p.name}: KL {p.kl:.4f} at {p.bits_mean:.2f} bits" for p in chosen]
        labels = [name if p is chosen[0] else "" for p in chosen]
        drawn = zip(chosen, tips, labels, strict=True)
        return [Point(p.bits_mean, p.kl, tip, label, label_below=chosen is mixed) for p, tip, label in drawn]

    series = [
        Series("one tier for all experts", 1, marks(uniform, "one tier for all experts")),
        Series("tiers by importance", 0, marks(mixed, "tiers by importance")),
    ]
    x, y = Axis("mean bits of an active expert weight"), Axis("KL from the original, nats per token", log=True)
    return plot(Figure("Quality against bits", frame=WIDE), series, x, y)


def memory(args: argparse.Namespace) -> str:
    """Return tokens per second against the budget, for each tier."""
    dymoe, tiers = Path(sys.executable).with_name("dymoe-run"), args.tiers.split(",")
    base = [dymoe, "bench", args.bundle, "--warm-up", "--json", "--threads", str(args.threads)]
    base += ["--prompt-tokens", "32", "--new-tokens", str(args.new_tokens)]
    floor = min_memory([*base, "--memory", "1MiB"])
    experts = sum(path.stat().st_size for path in args.bundle.glob("experts-*"))
    budgets = [floor + int(share * experts) for share in SHARES]
    found = defaultdict(list)
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        for tier in tiers:
            for budget in budgets:
                outcome = result(run([*base, "--tiers", tier], limit_for(budget)))[1]
                found[tier, budget].append(outcome["tokens_per_s"])
    series = []
    for slot, tier in enumerate(tiers):
        rates = [statistics.median(found[tier, budget]) for budget in budgets]
        print(f"tier {tier}: " + ", ".join(f"{b / 1e6:.0f} MB {r:.1f}" for b, r in zip(budgets, rates, strict=True)))
        marks = [
            Point(budget / 1e6, rate, f"{rate:.1f} tokens/s at {budget / 1e6:.0f} MB", f"{tier} bits" * (i == 3))
            for i, (budget, rate) in enumerate(zip(budgets, rates, strict=True))
        ]
        series.append(Series(f"{tier} bits", slot, marks))
    x, y = Axis("memory of the process, MB"), Axis("tokens/s decoded", from_zero=True)
    return plot(Figure("Speed against memory", frame=WIDE), series, x, y)


def standalone(figure: str) -> str:
    """Return the drawing of a figure as an SVG file with its own style."""
    drawing = re.search(r'<svg role="img".*?</svg>', figure, re.DOTALL)
    assert drawing is not None
    style = f"<style>{STYLE}svg{{background:var(--page)}}</style>"
    return (
        drawing[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{style}", 1) + "\n"
    )


if __name__ == "__main__":
    main()

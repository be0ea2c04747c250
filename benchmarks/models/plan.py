"""Compare plans with the bundles that were then made: planned over real sizes, least memory, speed and first token.

    python benchmarks/models/plan.py examples/model build/demo.dymoe
    python benchmarks/models/plan.py MODEL BUNDLE MODEL BUNDLE --memory 0 0.5 --rounds 3

Each round probes the machine anew, plans with that profile, and then times the bundle, because the speed of a machine
varies; ratios are medians of the rounds. `--memory` gives the memory of runs as shares of what the experts take above
the least that works; 0 is the least. By default all experts fit.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DECODED = 64


def main() -> None:
    """Print a table for each pair of a model and its bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="MODEL BUNDLE", help="checkpoints, each followed by its bundle")
    parser.add_argument("--memory", type=float, nargs="+", default=[1.0])
    parser.add_argument("--points", default="uniform-2,3,uniform-4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    if len(args.pairs) % 2:
        parser.error("give a bundle for each model")
    for model, bundle in zip(args.pairs[::2], args.pairs[1::2], strict=True):
        for share in args.memory:
            compare(model, bundle, share, args)


def compare(model: str, bundle: str, share: float, args: argparse.Namespace) -> None:
    """Print the ratios of a bundle, planned over real."""
    ratios: dict[str, list[float]] = defaultdict(list)
    real: dict[str, list[float]] = defaultdict(list)
    for number in range(args.rounds):
        print(f"{bundle}: round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            profile = Path(folder) / "here.toml"
            run("dymoe-run", "probe", bundle, "--write", profile, "--threads", args.threads, "--json")
            for what, planned, found in figures(model, bundle, profile, share, args):
                ratios[what].append(planned / found)
                real[what].append(found)
    print(f"\n{model}, {share:.0%} of the memory of its experts above the least")
    print(f"{'':<28}{'real':>14}{'planned / real':>16}{'range':>14}")
    for what, each in ratios.items():
        middle = statistics.median(real[what])
        print(f"{what:<28}{middle:>14.4g}{statistics.median(each):>16.3f}{min(each):>8.2f}-{max(each):.2f}")


def figures(
    model: str, bundle: str, profile: Path, share: float, args: argparse.Namespace
) -> list[tuple[str, float, float]]:
    """Return (what, planned, real) of all that is compared."""
    described = run("dymoe-bundle", "inspect", bundle, "--json")
    ladder = ",".join(str(tier["tier"]) for tier in described["tiers"])
    planned = plan(model, profile, ladder)
    floor = gate(bundle, profile, "memory")["measured"]
    memory = int(planned["floor_bytes"] + share * 1.1 * described["expert_bytes"]) >> 20
    text = re.sub(r'memory = ".*"', f'memory = "{memory}MiB"', profile.read_text(encoding="utf-8"))
    profile.write_text(text, encoding="utf-8")
    planned = plan(model, profile, ladder)
    found = [
        ("bundle bytes", planned["bundle_bytes"], described["total_bytes"]),
        ("least memory, bytes", planned["floor_bytes"], floor),
    ]
    for point in planned["points"]:
        if point["name"] not in args.points.split(",") or point["name"] not in {p["name"] for p in described["points"]}:
            continue
        flags = (bundle, "--point", point["name"], "--memory", f"{memory}MiB", "--threads", args.threads, "--json")
        warm = run("dymoe-run", "bench", *flags, "--warm-up", "--prompt-tokens", "64", "--new-tokens", str(DECODED))
        found.append((f"{point['name']}: tokens/s", point["tokens_per_s"], 1 / warm["tpot_s"]))
        tokens = str(planned["prompt_tokens"])
        cold = run("dymoe-run", "bench", *flags, "--no-preload", "--prompt-tokens", tokens, "--new-tokens", "1")
        found.append((f"{point['name']}: first token, s", point["first_token_s"], cold["ttft_s"]))
    return found


def plan(model: str, profile: Path, ladder: str) -> dict[str, Any]:
    """Return the plan of a model for one profile, with the length of its prompt."""
    made = run("dymoe-compile", model, "--plan", "--json", "--profile", profile, "--tiers", ladder)
    return {**made["profiles"][0], "prompt_tokens": made["prompt_tokens"]}


def gate(bundle: str, profile: Path, name: str) -> Mapping[str, Any]:
    """Return a gate of dymoe-bundle check."""
    gates = run("dymoe-bundle", "check", bundle, "--profile", profile, "--json")["gates"]
    return next(dict(gate) for gate in gates if gate["gate"] == name)


def run(program: str, *args: str | Path) -> dict[str, Any]:
    """Return the object that one of our commands prints."""
    command = [Path(sys.executable).with_name(program), *args]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()

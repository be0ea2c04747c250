"""How near decoding comes to what disk and kernels allow where memory is smaller than the model, and what is lost.

    python benchmarks/streaming/roofline.py BUNDLE --limit-mb 1964 982

A token can take no less than

    max(bytes read / disk, compute + what cannot overlap)

*disk* is what the probe reads per second inside the limit, and *compute* is a token with the whole bundle in memory.
What cannot overlap is the time to read, in each layer, the experts that were not prefetched, less the time in which the
layer's other experts are computed: they are not known before the layer is reached. *wait*: the time waited for reads
beyond that. *experts* and *rest*: how much longer these take than in memory, bookkeeping included.

*at once* is a bound of the same kind, with reading and computing as slow as `at_once.py` finds them while both go on,
untraced:

    max(both, beside + what cannot overlap)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # where limited.py is

from limited import checked, run

Line = Mapping[str, Any]
COLUMNS = (
    *("MB/token", "read", "compute", "no overlap", "roofline", "achieved", "ratio", "wait", "experts", "rest"),
    *("at once", "its ratio"),
)


def main() -> None:
    """Print a row for each limit and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--limit-mb", type=float, nargs="+", required=True, help="10^6 bytes, whole process")
    parser.add_argument("--settings", default="--tiers 4,--point 3,--tiers 2")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows: dict[tuple[float, str], list[dict[str, float]]] = defaultdict(list)
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        for limit in args.limit_mb:
            disk = probed_disk(args, limit)
            for setting in args.settings.split(","):
                in_memory, limited = traced(args, setting, 0), traced(args, setting, limit)
                row = bound(in_memory, limited, disk, experts_per_token(args.bundle))
                rows[limit, setting].append(row | at_once(args, setting, row))
    print(f"{'':<24}" + "".join(f"{name:>12}" for name in COLUMNS))
    for (limit, setting), found in rows.items():
        medians = [statistics.median(row[name] for row in found) for name in COLUMNS]
        print(f"{f'{limit:.0f} MB, {setting}':<24}" + "".join(f"{value:>12.2f}" for value in medians))


def probed_disk(args: argparse.Namespace, limit: float) -> float:
    """Return the bytes per second that the probe reads inside the limit."""
    command = [Path(sys.executable).with_name("dymoe-run"), "probe", args.bundle, "--json"]
    return float(json.loads(succeed([*command, "--threads", str(args.threads)], limit))["disk_bytes_per_s"])


def traced(args: argparse.Namespace, setting: str, limit: float) -> list[Line]:
    """Return the trace of a benchmark after its warm-up.

    Without a limit it is that of the second half, where nothing is read any more.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        command = [Path(sys.executable).with_name("dymoe-run"), "bench", args.bundle, "--warm-up", "--json"]
        command += ["--prompt-tokens", str(args.prompt), "--threads", str(args.threads), "--trace", trace]
        count = args.new_tokens if limit else 2 * args.new_tokens
        succeed([*command, "--new-tokens", str(count), *setting.split()], limit)
        lines = [json.loads(line) for line in trace.read_text().splitlines()]
    passes = [line["pass"] for line in lines if "layer" not in line and not line["prompt"]][-args.new_tokens :]
    return [line for line in lines if line["pass"] >= passes[0]]


def succeed(command: Sequence[str | Path], limit: float) -> str:
    """Run a command; return the last line that it prints."""
    return checked(run(command, int(limit * 1e6))).out.splitlines()[-1]


def experts_per_token(bundle: Path) -> int:
    """Return how many experts a token uses in a layer."""
    return int(json.loads((bundle / "manifest.json").read_text())["spec"]["top_k"])


def bound(in_memory: Sequence[Line], limited: Sequence[Line], disk: float, top_k: int) -> dict[str, float]:
    """Return a row of the table, in milliseconds except for the bytes and the ratio."""
    compute, experts_s, _ = parts(in_memory)
    achieved, inside, waited = parts(limited)
    tokens = sum("layer" not in line for line in limited)
    layers = [line for line in limited if "layer" in line]
    each_s = experts_s / (len(layers) / tokens) / top_k  # an expert in memory
    alone = 0.0
    for line in layers:
        not_prefetched = line["read_bytes"] - line["look_ahead_bytes"]
        alone += max(0.0, not_prefetched / disk - line["hits"] * each_s)
    alone /= tokens
    read_bytes = sum(line["read_bytes"] for line in layers) / tokens
    roofline = max(read_bytes / disk, compute + alone)
    return {
        "MB/token": read_bytes / 1e6,
        "read": 1e3 * read_bytes / disk,
        "compute": 1e3 * compute,
        "no overlap": 1e3 * alone,
        "roofline": 1e3 * roofline,
        "achieved": 1e3 * achieved,
        "ratio": achieved / roofline,
        "wait": 1e3 * (waited - alone),
        "experts": 1e3 * (inside - waited - experts_s),
        "rest": 1e3 * ((achieved - inside) - (compute - experts_s)),
    }


def at_once(args: argparse.Namespace, setting: str, row: Mapping[str, float]) -> dict[str, float]:
    """Return the last columns of a row."""
    command = [sys.executable, Path(__file__).with_name("at_once.py"), args.bundle, *setting.split()]
    command += ["--read-mb", str(row["MB/token"]), "--threads", str(args.threads)]
    found = json.loads(succeed(command, 0))
    bound_ms = max(found["both"], found["beside"] + row["no overlap"])
    return {"at once": bound_ms, "its ratio": row["achieved"] / bound_ms}


def parts(lines: Sequence[Line]) -> tuple[float, float, float]:
    """Return the mean seconds of a token: in all, in its experts, and waiting for them."""
    tokens = sum("layer" not in line for line in lines)
    total = sum(line["seconds"] for line in lines if "layer" not in line)
    inside = sum(line["seconds"] for line in lines if "layer" in line)
    waited = sum(line["wait_s"] for line in lines if "layer" in line)
    return total / tokens, inside / tokens, waited / tokens


if __name__ == "__main__":
    main()

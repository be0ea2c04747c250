r"""Decoding and prompts where memory is smaller than the model, against llama.cpp or ik_llama.cpp in the same limit.

    python benchmarks/streaming/against_llama.py BUNDLE --llama-bench PATH --limit-mb 1964 982 \
        --gguf Q4_0.gguf --gguf Q2_K.gguf

Each round runs every setting once, with an empty page cache, in a cgroup with each limit. The settings are this bundle
at `--tiers` and `--points`, and each GGUF file, mapped, behind a loop device with the read-ahead that suits it
(`--read-ahead-kb`, tuned; 0: as the disk comes). *decode*: `--new-tokens` random tokens, ours after a prompt. *prompt*:
of `--prompt` random tokens after another one, as llama-bench does. *cold s*: from the start of the process to the first
token after a prompt, which is its first. Prints medians, ranges and ratios, and the peak by the kernel's accounts.

With `--sweep-bench`, the llama-sweep-bench of ik_llama.cpp runs each file, with and without `--prefetch-experts`: after
a prompt, `--new-tokens` random tokens are decoded from an empty context, and then comes a prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # where limited.py is

from limited import checked, run

SECTOR = 512  # bytes; a loop device has whole ones

# test -> tokens per second of each round
Rates = dict[str, list[float]]


def main() -> None:
    """Print a table for each limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--sweep-bench", type=Path, help="of ik_llama.cpp")
    parser.add_argument("--gguf", type=Path, action="append", default=[])
    parser.add_argument("--limit-mb", type=float, nargs="+", required=True, help="10^6 bytes, whole process")
    parser.add_argument("--tiers", default="4,2")
    parser.add_argument("--points", default="3")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--read-ahead-kb", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", default="", help="more for dymoe-run, such as --no-prefetch")
    args = parser.parse_args()
    ours = [("--tiers", tier) for tier in filter(None, args.tiers.split(","))]
    ours += [("--point", point) for point in filter(None, args.points.split(","))]
    for limit in args.limit_mb:
        rates: dict[str, Rates] = defaultdict(lambda: defaultdict(list))
        for number in range(args.rounds):
            print(f"limit {limit:.0f} MB, round {number + 1} of {args.rounds}", file=sys.stderr)
            for setting in ours:
                add(rates[f"DyMoE {' '.join(setting).strip('-')}"], dymoe(args, setting, limit))
            for gguf in args.gguf:
                if args.llama_bench:
                    add(rates[f"llama.cpp {gguf.stem}"], llama(args, gguf, limit))
                if args.sweep_bench:
                    add(rates[f"ik {gguf.stem}"], sweep(args, gguf, limit))
                    add(rates[f"ik {gguf.stem}, prefetch"], sweep(args, gguf, limit, "--prefetch-experts"))
        report(limit, rates)


def add(rates: Rates, found: dict[str, float]) -> None:
    """Add the figures of one round."""
    for test, value in found.items():
        rates[test].append(value)


def dymoe(args: argparse.Namespace, setting: Sequence[str], limit: float) -> dict[str, float]:
    """Return the figures of this bundle, from a run after a warm-up and from a cold one."""
    command = [Path(sys.executable).with_name("dymoe-run"), "bench", args.bundle, *setting, "--json"]
    command += ["--prompt-tokens", str(args.prompt), "--threads", str(args.threads), *args.options.split()]
    warm = run([*command, "--new-tokens", str(args.new_tokens), "--warm-up"], int(limit * 1e6))
    result = json.loads(checked(warm).out.splitlines()[-1])
    cold = checked(run([*command, "--new-tokens", "1"], int(limit * 1e6)))
    return {
        "decode": result["tokens_per_s"],
        "prompt": args.prompt / result["ttft_s"],
        "cold s": cold.seconds - json.loads(cold.out.splitlines()[-1])["tpot_s"],
        "MB/token": result["decode_read_bytes_per_token"] / 1e6,
        "hit rate": 100 * result["hit_rate"],
        "peak MB": warm.peak_bytes / 1e6,
    }


def llama(args: argparse.Namespace, gguf: Path, limit: float) -> dict[str, float]:
    """Return the figures of llama.cpp, each from a process of its own."""
    found = {}
    sizes = {"decode": (0, args.new_tokens), "prompt": (args.prompt, 0), "cold s": (args.prompt, 0)}
    for test, (prompt, new) in sizes.items():
        with behind_loop(gguf, args.read_ahead_kb) as model:
            command = [args.llama_bench, "-m", model, "-t", str(args.threads), "-p", str(prompt), "-n", str(new)]
            command += ["-r", "1", "--repack", "0", "-o", "json", *(["--no-warmup"] if test == "cold s" else [])]
            outcome = checked(run(command, int(limit * 1e6)))
        rate = json.loads(outcome.out)[0]["samples_ts"][0]
        found[test] = outcome.seconds if test == "cold s" else rate
        found["peak MB"] = max(found.get("peak MB", 0.0), outcome.peak_bytes / 1e6)
    return found


def sweep(args: argparse.Namespace, gguf: Path, limit: float, *options: str) -> dict[str, float]:
    """Return the figures of ik_llama.cpp, whose llama-bench does not know `--prefetch-experts`."""
    prompt = str(args.prompt)
    with behind_loop(gguf, args.read_ahead_kb) as model:
        command = [args.sweep_bench, "-m", model, "-t", str(args.threads), "-c", prompt, "-b", prompt, "-ub", prompt]
        command += ["-n", str(args.new_tokens), "--warmup-batch", "--output-format", "jsonl", *options]
        outcome = checked(run(command, int(limit * 1e6)))
    lines = (outcome.out + outcome.err).splitlines()
    first = next(json.loads(line) for line in lines if line.startswith("{"))
    return {"decode": first["speed_tg"], "prompt": first["speed_pp"], "peak MB": outcome.peak_bytes / 1e6}


@contextmanager
def behind_loop(path: Path, read_ahead_kb: int) -> Iterator[Path]:
    """Yield a loop device over the file with that read-ahead, or with 0 the file itself."""
    if not read_ahead_kb:
        yield path
        return
    if path.stat().st_size % SECTOR:
        sys.exit(f"{path}: a loop device would cut off its last bytes; pad it with `truncate -s %{SECTOR} {path}`.")
    command = ["losetup", "--find", "--show", "--read-only", "--direct-io=on", str(path)]
    device = Path(subprocess.check_output(command, text=True).strip())
    try:
        (Path("/sys/block") / device.name / "queue/read_ahead_kb").write_text(str(read_ahead_kb))
        yield device
    finally:
        subprocess.run(["losetup", "-d", str(device)], check=True)


def report(limit: float, rates: dict[str, Rates]) -> None:
    """Print the table of one limit, and our ratios to each peer."""
    tests = ("decode", "prompt", "cold s", "MB/token", "hit rate", "peak MB")
    peers = [name for name in rates if not name.startswith("DyMoE")]
    print(f"\n{limit:.0f} MB{'':<12}" + "".join(f"{test:>24}" for test in tests))
    for name, found in rates.items():
        print(f"{name:<28}" + "".join(f"{cell(found.get(test, [])):>24}" for test in tests))
    for name in [name for name in rates if name not in peers]:
        for peer in peers:
            ratios = [
                f"{test} {statistics.median(rates[name][test]) / statistics.median(rates[peer][test]):.2f}"
                for test in ("decode", "prompt", "cold s")
                if rates[peer][test]
            ]
            print(f"{name} over {peer}: {', '.join(ratios)}")
    sys.stdout.flush()


def cell(values: Sequence[float]) -> str:
    """Return median and range, or nothing without values."""
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()

"""Check that a bundle gives the same text in every run: one run after another, then several at once.

    python benchmarks/streaming/same_text.py build/demo.dymoe --runs 200 --at-once 8

Each run is a process of its own with room for a third of the experts, so that all are read again. Prints how many runs
gave the text of the first; the exit code is 1 if one gave another.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dymoe_runtime.bundle.bundle import Bundle

PROMPT = "The river flows through the town of"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=200, help="runs one after another")
    parser.add_argument("--at-once", type=int, default=8, help="runs at the same time")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    args = parser.parse_args()
    first = answer(args.bundle, args.tokens)
    same = sum(answer(args.bundle, args.tokens) == first for _ in range(args.runs - 1)) + 1
    print(f"{same} of {args.runs} runs in a row gave the same text", flush=True)
    with ThreadPoolExecutor(args.at_once) as pool:
        texts = list(pool.map(lambda _: answer(args.bundle, args.tokens), range(args.at_once)))
    together = texts.count(first)
    print(f"{together} of {args.at_once} runs at once gave the same text")
    sys.exit(0 if (same, together) == (args.runs, args.at_once) else 1)


def answer(bundle: Path, tokens: int) -> str:
    """Return the answer of a run; exit with its message if it fails."""
    arena = Bundle.open(bundle).expert_bytes() // 3
    options = ["--greedy", "--point", "3", "--arena", str(arena), "--max-tokens", str(tokens), "--ignore-eos"]
    command = [sys.executable, "-m", "dymoe_runtime", str(bundle), "--prompt", PROMPT, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        sys.exit(result.stderr)
    return result.stdout


if __name__ == "__main__":
    main()

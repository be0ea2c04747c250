"""Peak memory, reads and speed at the least memory that works and at shares of the experts above it.

    python benchmarks/memory.py BUNDLE [PROMPT]

Prints a table and exits with 1 if a peak exceeds its budget by 5% or the tokens differ between budgets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

SHARES = (0.0, 0.25, 0.4, 0.6)
TOKENS = 32


def run(bundle: str, prompt: str, memory: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dymoe_runtime", bundle, "--prompt", prompt, "--max-tokens", str(TOKENS)]
    return subprocess.run([*command, "--ignore-eos", "--memory", memory, "--json"], capture_output=True, text=True)


def least(bundle: str, prompt: str) -> int:
    """What the error for too small a budget names, in bytes."""
    refused = run(bundle, prompt, "1MiB")
    found = re.search(r"--memory (\d+)MiB", refused.stderr)
    if found is None:
        sys.exit(refused.stderr)
    return int(found[1]) << 20


def expert_bytes(bundle: str) -> int:
    command = [sys.executable, "-c", "from dymoe_runtime.cli import bundle; bundle()", "inspect", bundle, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["expert_bytes"]


def main(bundle: str, prompt: str = "The river flows through the town of") -> None:
    floor, experts = least(bundle, prompt), expert_bytes(bundle)
    texts, fits = set(), True
    print("| budget MiB | peak MiB | peak/budget | arena MiB | hit rate | MB read per token | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for share in SHARES:
        memory = floor + int(experts * share)
        done = run(bundle, prompt, str(memory))
        if done.returncode:
            sys.exit(done.stderr)
        s = json.loads(done.stdout.strip().splitlines()[-1])
        texts.add(s["text"])
        ratio = s["peak_rss_bytes"] / memory
        fits &= ratio <= 1.05
        print(
            f"| {memory >> 20} (floor + {share:.0%}) | {s['peak_rss_bytes'] >> 20} | {ratio:.2f} "
            f"| {s['arena_bytes'] >> 20} | {s['hit_rate']:.1%} "
            f"| {s['read_bytes_per_token'] / 1e6:.1f} | {s['tokens_per_s']:.1f} |"
        )
    print(f"same tokens at every budget: {'yes' if len(texts) == 1 else 'NO'}")
    sys.exit(not (fits and len(texts) == 1))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])

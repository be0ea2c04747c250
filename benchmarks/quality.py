"""The quality table of the README: the original, uniform tiers and operating points on each text.

python benchmarks/quality.py BUNDLE CHECKPOINT TEXT...
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def evaluate(bundle: str, checkpoint: str, texts: list[str], *flags: str) -> list[dict]:
    command = [sys.executable, "-m", "dymoe_runtime", bundle, "--reference", checkpoint, "--json", *flags]
    done = subprocess.run([*command, "--eval", *texts], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["table"]


def main(bundle: str, checkpoint: str, *texts: str) -> None:
    rows = evaluate(bundle, checkpoint, list(texts))
    for point in ("3", "2.5"):
        rows += evaluate(bundle, checkpoint, list(texts), "--point", point)[1:]
    names = [Path(text).stem for text in texts]
    print("| | bits |" + "".join(f" {name} nll | kl | top-1 |" for name in names))
    print("|---|---|" + "---|---|---|" * len(names))
    for row in rows:
        cells = "".join(format_cell(score) for score in row["files"])
        print(f"| {row['point']} | {row['bits_mean'] or 16:.2f} |{cells}")


def format_cell(score: dict) -> str:
    return f" {score['nll']:.4f} | {score.get('kl', 0):.4f} | {score.get('top1_agreement', 1):.1%} |"


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

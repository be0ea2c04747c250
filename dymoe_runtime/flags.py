"""The flags of dymoe-run: which go together."""

from __future__ import annotations

import re
from typing import Any

import click


def check_flags(o: dict[str, Any]) -> None:
    """UsageError for flags that contradict each other."""
    modes = [name for name in ("eval_files", "bench", "probing", "chat") if o[name]]
    if len(modes) > 1:
        raise click.UsageError("--eval, --bench, --probe and --chat exclude each other")
    if o["prompt"] is not None and o["prompt_file"] is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other")
    for name in ("prompt", "prompt_file"):
        if o[name] is not None and (o["bench"] or o["probing"] or o["eval_files"]):
            raise click.UsageError(f"--{name.replace('_', '-')} goes with neither --bench, --probe nor --eval")
    if o["system"] is not None and not o["chat"]:
        raise click.UsageError("--system goes with --chat")
    if len(set(o["eval_files"])) < len(o["eval_files"]):
        raise click.UsageError("--eval names a file twice")
    if o["warm_up"] and not o["bench"]:
        raise click.UsageError("--warm-up goes with --bench")
    if o["reference"] and not o["eval_files"]:
        raise click.UsageError("--reference goes with --eval")
    chosen = [name for name in ("point", "quality", "tpot") if o[name] is not None]
    chosen += ["tiers"] if o["tiers"] != "auto" else []
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join('--' + name for name in chosen)} exclude each other")
    if o["tpot"] is not None and (o["eval_files"] or o["probing"]):
        raise click.UsageError("--tpot goes with neither --eval nor --probe")
    if (o["tpot"] is not None or o["quality"] is not None) and (o["no_dynamic"] or o["no_depth"]):
        raise click.UsageError("--tpot and --quality choose measured points, which --no-dynamic and --no-depth are not")
    if o["latency"] and (o["eval_files"] or o["probing"]):
        raise click.UsageError("--latency depends on what is in memory, which --eval and --probe must not")
    if o["no_preload"] and (o["eval_files"] or o["probing"]):
        raise click.UsageError("--no-preload goes with neither --eval nor --probe, which never do")
    if o["trace"] is not None and (o["eval_files"] or o["probing"]):
        raise click.UsageError("--trace goes with neither --eval nor --probe")
    if o["decisions"] is not None and (o["latency"] or o["tpot"] is not None or o["eval_files"] or o["probing"]):
        raise click.UsageError("--decisions goes with neither --latency, --tpot, --eval nor --probe")
    if o["decisions"] is not None and o["decisions"] == o["trace"]:
        raise click.UsageError("--decisions and --trace name the same file")
    if o["warm_set"] is not None and (o["eval_files"] or o["probing"]):
        raise click.UsageError("--warm-set goes with neither --eval nor --probe")
    if o["tiers"] != "auto" and not re.fullmatch("[0-9]{1,2}", o["tiers"]):
        raise click.UsageError(f"--tiers {o['tiers']}: expected auto or one tier, such as 4")
    if o["point"] not in (None, "auto") and not _is_bits(o["point"]):
        raise click.UsageError(f"--point {o['point']}: expected auto or mean bits, such as 3.0")


def _is_bits(text: str) -> bool:
    try:
        return 0 < float(text) < 100
    except ValueError:
        return False

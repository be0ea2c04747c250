"""dymoe-run: its options."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import click

from dymoe_runtime.console import MOST_SEED, MOST_THREADS, Duration, ManyValues, Size, one_sentence, sparing_imports
from dymoe_runtime.errors import importing
from dymoe_runtime.eviction import EVICTIONS, GROWTH
from dymoe_runtime.flags import check_flags


@click.command(cls=ManyValues)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to continue.")
@click.option(
    "--prompt-file", type=click.Path(path_type=Path, allow_dash=True), help="Read the prompt from a file; - is stdin."
)
@click.option(
    "--chat", is_flag=True, help="Converse by the model's chat template, a line a turn; with a prompt, answer once."
)
@click.option("--system", help="System message for --chat.")
@click.option("--eval", "eval_files", multiple=True, metavar="FILE…", help="Score texts, teacher-forced.")
@click.option("--reference", type=click.Path(path_type=Path), help="Bundle or checkpoint that --eval compares with.")
@click.option(
    "--eval-phase",
    type=click.Choice(["decode", "prefill"]),
    default="decode",
    show_default=True,
    help="Rule that chooses tiers in --eval.",
)
@click.option("--bench", is_flag=True, help="Time random tokens.")
@click.option("--probe", "probing", is_flag=True, help="Measure this machine with BUNDLE and say what to expect.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Prompt of --bench.")
@click.option("--warm-up", is_flag=True, help="Run another prompt of that length before --bench takes the time.")
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Decoded tokens of --bench.")
@click.option("--memory", type=Size(), help="Budget of the whole process; default: what the cgroup or the machine has.")
@click.option("--arena", type=Size(), hidden=True, help="For tests: the expert arena alone.")
@click.option("--fade", type=click.FloatRange(1, 100), default=GROWTH, hidden=True, help="To compare: 1 LFU, 2 LRU.")
@click.option("--eviction", type=click.Choice(EVICTIONS), default=EVICTIONS[0], hidden=True, help="To compare.")
@click.option("--no-overlap", is_flag=True, hidden=True, help="To compare: compute no expert before all are read.")
@click.option("--warm-set", type=click.Path(path_type=Path), help="Keep in this file which experts to read first.")
@click.option("--no-preload", is_flag=True, help="Do not read likely experts before they are asked for.")
@click.option("--context", type=click.IntRange(2), help="Tokens of context to make room for.")
@click.option(
    "--kv-bits", type=click.Choice(["8", "16", "32"]), default="16", show_default=True, help="Of the KV cache."
)
@click.option("--point", help="Operating point: mean bits, or auto to fit the memory. Default: the bundle's.")
@click.option("--quality", type=click.FloatRange(0, min_open=True), metavar="KL", help="The smallest point this good.")
@click.option("--tpot", type=Duration(), help="Find and hold the best point that takes at most this per token: 100ms.")
@click.option("--tiers", default="auto", show_default=True, help="Run every expert at this tier instead.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="Default: all cores that this process may use.")
@click.option("--pin-threads", is_flag=True, help="Keep each thread of the kernels on a processor of its own.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 is off.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT…", help="End before this text.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end-of-text token.")
@click.option("--latency", is_flag=True, help="Do not wait for all bits of an expert that matters less.")
@click.option("--no-look-ahead", is_flag=True, help="Do not read the next layer's experts early.")
@click.option("--no-dynamic", is_flag=True, help="One tier for all experts, the nearest to the point's bits.")
@click.option("--no-depth", is_flag=True, help="The same thresholds in all layers.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write what every layer of every token does, as JSONL.")
@click.option(
    "--decisions",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Choose the tiers that this trace of the same prompt has.",
)
@click.option("--stats", is_flag=True, help="Print what the run cost to stderr.")
@click.option("--json", "as_json", is_flag=True, help="End stdout with one JSON object.")
@click.version_option(package_name="dymoe")
@one_sentence
def run(bundle: Path, **o: Any) -> None:
    """Generate text from BUNDLE inside a memory budget."""
    check_flags(o)
    _loaded()(bundle, o)


@cache  # what is imported is spared once
def _loaded() -> Callable[[Path, dict[str, Any]], None]:
    """What does the work, whose imports neither --help nor a wrong flag waits for."""
    with importing(), sparing_imports():
        from dymoe_runtime.commands import execute
    return execute

"""The flags of dymoe-run, and which of them go together."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import click

from dymoe_runtime.cli.flags import flag, names_of
from dymoe_runtime.console import MAX_SEED, Duration, FiniteRange, Size
from dymoe_runtime.engine.options import MAX_DECAY, MIN_CONTEXT
from dymoe_runtime.process import MAX_THREADS
from dymoe_runtime.spec import KV_BITS
from dymoe_runtime.store import DECAY, EVICTIONS
from dymoe_runtime.text import CONTEXT_POLICIES

MODE, INPUT, CHAT, OUTPUT, SAMPLING = "What to do", "Input", "Conversation", "Output", "Sampling"
MEMORY, PRECISION, SPEED, TRACING = "Memory", "Precision", "Speed", "Tracing"
EVALUATION, BENCHMARK, COMPARISON = "Evaluation", "Benchmark", "For comparisons"
INTEGRITY, PROFILE, SERVING = "Integrity", "Profile", "Serving"

# Requests that wait hold memory.
MAX_PARALLEL = 64
MAX_QUEUE = 10_000
REASONING = ("show", "hide")
BY_MODEL = "Default: the model's."


@dataclass(frozen=True, eq=False)
class RunFlags:
    """All flags of dymoe-run; each subcommand has a part of them."""

    chat: bool = flag(
        "--chat",
        group=MODE,
        default=False,
        help="Converse by the model's chat template, a line a turn; with a prompt, answer once.",
    )
    eval_files: tuple[str, ...] = flag(
        "--eval", group=MODE, default=(), multiple=True, metavar="FILE…", help="Score texts, teacher-forced."
    )
    bench: bool = flag("--bench", group=MODE, default=False, help="Time random tokens.")
    probe: bool = flag(
        "--probe", group=MODE, default=False, help="Measure this machine with BUNDLE and say what to expect."
    )
    write: Path | None = flag(
        "--write",
        group=PROFILE,
        type=click.Path(path_type=Path),
        metavar="NAME.toml",
        help="Write this machine's rates as a profile for dymoe-compile.",
    )
    overwrite: bool = flag("--overwrite", group=PROFILE, default=False, help="Replace the file of --write.")
    serve: bool = flag(
        "--serve", group=MODE, default=False, help="Serve BUNDLE to clients of OpenAI's, Anthropic's and Ollama's APIs."
    )
    host: str = flag(
        "--host",
        group=SERVING,
        default="127.0.0.1",
        show_default=True,
        help="Address to listen on; others than this machine's own loopback let others in.",
    )
    port: int = flag(
        "--port",
        group=SERVING,
        default=8080,
        type=click.IntRange(0, 65535),
        show_default=True,
        help="Port to listen on; 0 takes a free one.",
    )
    model_name: str | None = flag(
        "--model-name", group=SERVING, metavar="NAME", help="Name of the model. Default: that of BUNDLE."
    )
    parallel: int | None = flag(
        "--parallel",
        group=SERVING,
        type=click.IntRange(1, MAX_PARALLEL),
        help="Requests that run together, each with a KV cache of --context tokens. Default: 4, or as many as take an "
        "eighth of the memory.",
    )
    prompt_cache: Path | None = flag(
        "--prompt-cache",
        group=SERVING,
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="Keep what was computed of prompts in this directory, also for the next start.",
    )
    prompt_cache_size: int = flag(
        "--prompt-cache-size",
        group=SERVING,
        default=2 << 30,
        type=Size(),
        help="Most bytes of --prompt-cache; what was used longest ago leaves first. Default: 2GiB.",
    )
    queue: int = flag(
        "--queue",
        group=SERVING,
        default=64,
        type=click.IntRange(1, MAX_QUEUE),
        show_default=True,
        help="Most requests that wait; more are told to come back later.",
    )
    api_key_file: Path | None = flag(
        "--api-key-file",
        group=SERVING,
        type=click.Path(path_type=Path),
        help="Let in only requests with a key of this file, which has one a line.",
    )
    cors: tuple[str, ...] = flag(
        "--cors",
        group=SERVING,
        default=(),
        multiple=True,
        metavar="ORIGIN…",
        help="Let web pages of this origin use the server, such as http://localhost:3000; * is all.",
    )
    max_body: int = flag(
        "--max-body", group=SERVING, default=8 << 20, type=Size(), help="Most bytes of a request. Default: 8MiB."
    )
    time_limit: float = flag(
        "--time-limit",
        group=SERVING,
        default=3600.0,
        type=Duration(),
        help="End an answer that takes longer, such as 90s. Default: 3600s.",
    )
    grace: float = flag(
        "--grace",
        group=SERVING,
        default=10.0,
        type=Duration(),
        help="Time that running answers have to end on SIGTERM. Default: 10s.",
    )
    prompt: str | None = flag("--prompt", group=INPUT, help="Text to continue, or with chat to answer.")
    prompt_file: Path | None = flag(
        "--prompt-file",
        group=INPUT,
        type=click.Path(path_type=Path, allow_dash=True),
        help="Read the prompt from a file; - is stdin.",
    )
    system: str | None = flag("--system", group=INPUT, help="System message of the conversation.")
    thinking: bool | None = flag(
        "--thinking/--no-thinking",
        group=CHAT,
        is_flag=True,
        help="Switch the model's reasoning on or off, if its chat template can. Default: the template's.",
    )
    reasoning: str = flag(
        "--reasoning",
        group=CHAT,
        default=REASONING[0],
        type=click.Choice(REASONING),
        show_default=True,
        help="Show what the model thinks before it answers, or hide it.",
    )
    template_var: tuple[str, ...] = flag(
        "--template-var",
        group=CHAT,
        default=(),
        multiple=True,
        metavar="NAME=VALUE…",
        help="Set a variable of the chat template; VALUE is JSON or else a text.",
    )
    context_policy: str = flag(
        "--context-policy",
        group=CHAT,
        default=CONTEXT_POLICIES[0],
        type=click.Choice(CONTEXT_POLICIES),
        show_default=True,
        help="When the context is full, drop the oldest turns from it, or stop.",
    )
    session: Path | None = flag(
        "--session",
        group=INPUT,
        type=click.Path(path_type=Path, dir_okay=False),
        help="Keep the conversation and the model's state in this file, and go on with it.",
    )
    max_tokens: int | None = flag(
        "--max-tokens",
        group=SAMPLING,
        type=click.IntRange(1),
        help="Most tokens of an answer. Default: until the model ends it or the context is full.",
    )
    greedy: bool = flag("--greedy", group=SAMPLING, default=False, help="Always take the likeliest token.")
    temperature: float | None = flag("--temperature", group=SAMPLING, type=float, help=f"0 is greedy. {BY_MODEL}")
    top_k: int | None = flag("--top-k", group=SAMPLING, type=int, metavar="N", help=f"0 is off. {BY_MODEL}")
    top_p: float | None = flag("--top-p", group=SAMPLING, type=float, help=f"1 is off. {BY_MODEL}")
    min_p: float | None = flag("--min-p", group=SAMPLING, type=float, help=f"0 is off. {BY_MODEL}")
    repetition_penalty: float | None = flag(
        "--repetition-penalty", group=SAMPLING, type=float, help=f"1 is off. {BY_MODEL}"
    )
    presence_penalty: float | None = flag(
        "--presence-penalty",
        group=SAMPLING,
        type=float,
        help="Take this off the logit of each token that was generated. Default: 0.",
    )
    frequency_penalty: float | None = flag(
        "--frequency-penalty",
        group=SAMPLING,
        type=float,
        help="Take this off the logit of a token for each time that it was generated. Default: 0.",
    )
    seed: int = flag(
        "--seed",
        group=SAMPLING,
        default=0,
        type=click.IntRange(0, MAX_SEED),
        show_default=True,
        help="Seed of the sampler.",
    )
    stop: tuple[str, ...] = flag(
        "--stop", group=SAMPLING, default=(), multiple=True, metavar="TEXT…", help="End before this text."
    )
    grammar: Path | None = flag(
        "--grammar",
        group=SAMPLING,
        type=click.Path(path_type=Path, allow_dash=False),
        help="Let answers follow the grammar in this file: GBNF, or Lark.",
    )
    json_schema: str | None = flag(
        "--json-schema",
        group=SAMPLING,
        metavar="SCHEMA",
        help="Let answers be JSON that fits this schema: JSON, or the name of a file.",
    )
    ignore_eos: bool = flag("--ignore-eos", group=SAMPLING, default=False, help="Go on past the end-of-text token.")
    expect: str | None = flag(
        "--expect",
        group=INTEGRITY,
        metavar="DIGEST",
        help="Read all of BUNDLE first, and refuse one of another digest; `dymoe-bundle digest` prints it.",
    )
    memory: int | None = flag(
        "--memory", group=MEMORY, type=Size(), help="Budget of the whole process. Default: what is available."
    )
    context: int | None = flag(
        "--context", group=MEMORY, type=click.IntRange(MIN_CONTEXT), help="Tokens of context to make room for."
    )
    kv_bits: str = flag(
        "--kv-bits",
        group=MEMORY,
        default="16",
        type=click.Choice([str(bits) for bits in KV_BITS]),
        show_default=True,
        help="Bits of the KV cache.",
    )
    warm_set: Path | None = flag(
        "--warm-set",
        group=MEMORY,
        type=click.Path(path_type=Path),
        help="Remember in this file which experts to read first.",
    )
    no_preload: bool = flag(
        "--no-preload", group=MEMORY, default=False, help="Do not read likely experts before they are asked for."
    )
    point: str | None = flag(
        "--point",
        group=PRECISION,
        help="Operating point: its name or mean bits, or auto to fit the memory. Default: the bundle's.",
    )
    quality: float | None = flag(
        "--quality",
        group=PRECISION,
        type=FiniteRange(0, min_open=True),
        metavar="KL",
        help="Run the smallest point with at most this KL.",
    )
    tpot: float | None = flag(
        "--tpot",
        group=PRECISION,
        type=Duration(),
        help="Find and hold the best point that takes at most this per token, such as 100ms.",
    )
    tiers: str = flag(
        "--tiers",
        group=PRECISION,
        default="auto",
        show_default=True,
        metavar="TIER",
        help="Run every expert at one tier of the bundle, such as 4.",
    )
    latency: bool = flag(
        "--latency",
        group=PRECISION,
        default=False,
        help="When decoding, run an expert at a lower tier in memory rather than wait for the disk.",
    )
    no_dynamic: bool = flag(
        "--no-dynamic",
        group=COMPARISON,
        default=False,
        help="Run all experts at one tier, the nearest to the point's bits.",
    )
    no_depth: bool = flag("--no-depth", group=COMPARISON, default=False, help="Use the same thresholds in all layers.")
    no_prefetch: bool = flag(
        "--no-prefetch",
        "--no-look-ahead",
        group=SPEED,
        default=False,
        help="Do not read the next layer's likely experts early.",
    )
    threads: int | None = flag(
        "--threads",
        group=SPEED,
        type=click.IntRange(1, MAX_THREADS),
        help="Threads to compute with. Default: all cores that this process may use.",
    )
    pin_threads: bool = flag(
        "--pin-threads", group=SPEED, default=False, help="Keep each thread on a processor of its own."
    )
    trace: Path | None = flag(
        "--trace",
        group=TRACING,
        type=click.Path(path_type=Path),
        help="Write what every layer of every pass does, as JSON lines.",
    )
    decisions: Path | None = flag(
        "--decisions",
        group=TRACING,
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Choose the tiers recorded in this trace of the same prompt.",
    )
    stats: bool = flag("--stats", group=OUTPUT, default=False, help="Print what the run cost to stderr.")
    as_json: bool = flag("--json", group=OUTPUT, default=False, help="Print one JSON object, alone, to stdout.")
    reference: Path | None = flag(
        "--reference",
        group=EVALUATION,
        type=click.Path(path_type=Path),
        help="Bundle or checkpoint to compare with.",
    )
    eval_phase: str = flag(
        "--eval-phase",
        group=EVALUATION,
        default="decode",
        type=click.Choice(["decode", "prefill"]),
        show_default=True,
        help="Rule that chooses tiers: that of decoding, or of prompts.",
    )
    prompt_tokens: int = flag(
        "--prompt-tokens",
        group=BENCHMARK,
        default=128,
        type=click.IntRange(1),
        show_default=True,
        help="Tokens of the prompt.",
    )
    new_tokens: int = flag(
        "--new-tokens",
        group=BENCHMARK,
        default=64,
        type=click.IntRange(1),
        show_default=True,
        help="Tokens to decode.",
    )
    warm_up: bool = flag(
        "--warm-up",
        group=BENCHMARK,
        default=False,
        help="Run another prompt of that length first.",
    )
    arena: int | None = flag(
        "--arena", group=COMPARISON, type=Size(), help="Memory for experts alone, whatever the budget leaves."
    )
    decay: float = flag(
        "--decay",
        "--fade",
        group=COMPARISON,
        default=DECAY,
        type=FiniteRange(1, MAX_DECAY),
        show_default=True,
        help="Factor by which a use counts more with each token: 1 is LFU, 2 nearly LRU.",
    )
    eviction: str = flag(
        "--eviction",
        group=COMPARISON,
        default=EVICTIONS[0],
        type=click.Choice(EVICTIONS),
        show_default=True,
        help="What leaves memory first.",
    )
    no_overlap: bool = flag(
        "--no-overlap", group=COMPARISON, default=False, help="Compute no expert before all are read."
    )

    def given(self, name: str) -> bool:
        """Return whether a flag was given a value other than its default."""
        return bool(getattr(self, name) != DEFAULTS[name])


DEFAULTS = {field.name: field.default for field in fields(RunFlags)}


class Conflict(NamedTuple):
    """Flags that exclude each other, and the reason if it is not obvious."""

    flags: tuple[str, ...]
    reason: str = ""


EXCLUSIVE = (
    Conflict(("eval_files", "bench", "probe", "chat", "serve")),
    Conflict(("prompt", "prompt_file")),
    Conflict(("point", "quality", "tpot", "tiers")),
    Conflict(("greedy", "temperature")),
    Conflict(("grammar", "json_schema", "ignore_eos")),
)
# (flag, flags that it cannot be combined with, reason if it is not obvious)
NOT_WITH: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("prompt", ("bench", "probe", "eval_files", "serve"), ""),
    ("prompt_file", ("bench", "probe", "eval_files", "serve"), ""),
    ("session", ("bench", "probe", "eval_files", "serve"), ""),
    ("grammar", ("bench", "probe", "eval_files", "serve"), ""),
    ("json_schema", ("bench", "probe", "eval_files", "serve"), ""),
    ("session", ("decisions",), "the trace begins with an empty context"),
    ("tpot", ("eval_files", "probe"), ""),
    ("tpot", ("no_dynamic", "no_depth"), "it chooses measured points, which these are not"),
    ("quality", ("no_dynamic", "no_depth"), "it chooses measured points, which these are not"),
    ("latency", ("eval_files", "probe"), "it depends on what is in memory, which these must not"),
    ("no_preload", ("eval_files", "probe"), "these never preload"),
    ("trace", ("eval_files", "probe", "serve"), ""),
    ("decisions", ("latency", "tpot", "eval_files", "probe", "serve"), ""),
    ("stats", ("serve",), "/metrics and /props have them"),
    ("as_json", ("serve",), "/metrics and /props have the statistics"),
    ("warm_set", ("eval_files", "probe"), ""),
)
# flag -> flags of which it needs one
REQUIRES: dict[str, tuple[str, ...]] = {
    "system": ("chat",),
    "thinking": ("chat", "serve"),
    "reasoning": ("chat",),
    "template_var": ("chat", "serve"),
    "context_policy": ("chat",),
    "warm_up": ("bench",),
    "prompt_tokens": ("bench",),
    "new_tokens": ("bench",),
    "reference": ("eval_files",),
    "eval_phase": ("eval_files",),
    "host": ("serve",),
    "port": ("serve",),
    "model_name": ("serve",),
    "queue": ("serve",),
    "parallel": ("serve",),
    "prompt_cache": ("serve",),
    "prompt_cache_size": ("prompt_cache",),
    "api_key_file": ("serve",),
    "cors": ("serve",),
    "max_body": ("serve",),
    "time_limit": ("serve",),
    "grace": ("serve",),
    "write": ("probe",),
    "overwrite": ("write",),
}


def unfit_for(mode: str) -> set[str]:
    """Return the fields of RunFlags that cannot be combined with `mode`, a field such as "bench"."""
    return {name for name, others, _ in NOT_WITH if mode in others}


def check_flags(flags: RunFlags) -> None:
    """Raise UsageError for flags that contradict each other."""
    names = names_of(RunFlags)
    for conflict in EXCLUSIVE:
        given = [names[name] for name in conflict.flags if flags.given(name)]
        if len(given) > 1:
            raise click.UsageError(f"{' and '.join(given)} exclude each other")
    for name, others, reason in NOT_WITH:
        for other in others:
            if flags.given(name) and flags.given(other):
                why = f": {reason}" if reason else ""
                raise click.UsageError(f"{names[name]} does not go with {names[other]}{why}")
    for name, needed in REQUIRES.items():
        if flags.given(name) and not any(map(flags.given, needed)):
            raise click.UsageError(f"{names[name]} goes with {' or '.join(names[other] for other in needed)}")
    for file in flags.eval_files:
        if flags.eval_files.count(file) > 1:
            raise click.UsageError(f"{file} is named twice; each text is scored once")
    if flags.decisions is not None and flags.decisions == flags.trace:
        raise click.UsageError("--decisions and --trace name the same file")
    if flags.tiers != "auto" and not re.fullmatch("[0-9]{1,2}", flags.tiers):
        raise click.UsageError(f"--tiers {flags.tiers}: expected auto or one tier, such as 4")
    if flags.point not in (None, "auto") and not is_point(str(flags.point)):
        raise click.UsageError(f"--point {flags.point}: expected auto, a point's name or mean bits, such as 3.0")


def is_point(text: str) -> bool:
    """Return whether a text could name an operating point."""
    if re.fullmatch("uniform-[0-9]{1,2}", text):
        return True
    try:
        return 0 < float(text) < 100
    except ValueError:
        return False

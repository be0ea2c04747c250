"""Loading a model as the flags of dymoe-run say, and its statistics as text."""

from __future__ import annotations

from typing import Any, TypeVar

import click

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.cli.run_flags import RunFlags
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.model import LoadedModel, Model
from dymoe_runtime.engine.options import RunOptions, label_of
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.process import memory_limit
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.units import format_size

M = TypeVar("M", bound=LoadedModel)


def run_options(flags: RunFlags, context: int) -> RunOptions:
    """Return the options that the flags ask for, with room for `context` tokens unless --context says otherwise."""
    return RunOptions(
        memory_bytes=flags.memory,
        arena_bytes=flags.arena,
        context=flags.context or context,
        kv_bits=int(flags.kv_bits),
        point=flags.point,
        quality=flags.quality,
        tier=None if flags.tiers == "auto" else int(flags.tiers),
        threads=flags.threads,
        pin_threads=flags.pin_threads,
        trace=flags.trace,
        decisions=flags.decisions,
        decay=flags.decay,
        eviction=flags.eviction,
        overlap=not flags.no_overlap,
        preload=not flags.no_preload and flags.tpot is None,
        warm_set=flags.warm_set,
        latency=flags.latency,
        prefetch=not flags.no_prefetch,
        dynamic=not flags.no_dynamic,
        depth=not flags.no_depth,
    )


def load(bundle: Bundle, kernels: Kernels, flags: RunFlags, context: int) -> Model:
    """Load a bundle with room for `context` tokens, but at most the model's context; note on stderr what differs.

    Raises DymoeError as `load_model` does.
    """
    return prepared(load_model(bundle, run_options(flags, min(context, bundle.spec.max_context)), kernels), flags)


def prepared(model: M, flags: RunFlags) -> M:
    """Return a loaded model with the pace that the flags ask for; note what differs from them."""
    try:
        say_what_differs(model, flags)
        if flags.tpot is not None:
            from dymoe_runtime.tools.probe import find_tpot  # seldom needed

            find_tpot(model, flags.tpot)
            if not flags.no_preload:
                model.preload()
    except BaseException:
        model.close()
        raise
    return model


def say_what_differs(model: LoadedModel, flags: RunFlags) -> None:
    """Print a note on stderr if the operating point or the memory is not exactly the requested one."""
    if model.note:
        click.echo(f"note: --point: {model.note}", err=True)
    if flags.memory is not None and flags.memory > (available := memory_limit()):
        click.echo(
            f"note: of --memory {format_size(flags.memory)} only {format_size(available)} are available just now; "
            "the system may swap or end this process",
            err=True,
        )


def format_statistics(s: dict[str, Any]) -> str:
    """Return the statistics of a run as a few lines of text.

    `sampling`, the settings of the sampler, and `turn`, the last Turn, may be among them.
    """
    shares = ", ".join(f"{tier} bits {share:.0%}" for tier, share in s["tier_shares"].items())
    ahead = s["look_ahead"]
    text = []
    if "sampling" in s:
        text.append(f"sampling    {SamplingParams(**s['sampling'])}")
    if s.get("turn") is not None:
        text.append(
            f"turn        {s['turn'].new_tokens} new tokens of {s['turn'].prompt_tokens}, "
            f"{s['turn'].reused_tokens} kept from before, {s['turn'].answer_tokens} answered"
        )
    return "\n".join(
        (
            *text,
            f"precision   {label_of(s['point'])}: {s['bits_mean']:.2f} bits per active expert ({shares})",
            f"experts     {format_size(s['read_bytes'])} read, {format_size(s['read_bytes_per_token'])} per token, "
            f"hit rate {s['hit_rate']:.1%}, {s['evictions']} evictions, "
            f"{format_size(s['resident_bytes'])} resident of {format_size(s['arena_bytes'])}",
            f"prefetch    {ahead['reads']} reads, {format_size(ahead['bytes'])}: "
            f"{ahead['hits']} used, {ahead['waste']} not",
            f"speed       prompt {s['prompt_tokens']} tokens at {s['prompt_tokens_per_s']:.1f}/s, "
            f"first token after {s['ttft_s']:.2f} s, then {s['tokens_per_s']:.1f} tokens/s",
            f"memory      peak {format_size(s['peak_rss_bytes'])}, budget {format_size(s['memory_bytes'])}, "
            f"least that works {format_size(s['floor_bytes'])}",
        )
    )

"""Measurements of dymoe-run: benchmarks, probes of the machine, and scores of texts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.cli.load import format_statistics, load, run_options
from dymoe_runtime.cli.run_flags import RunFlags
from dymoe_runtime.console import print_json, progress_bar, say
from dymoe_runtime.engine.load import load_model, load_scorer
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import read_text
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.process import peak_resident_bytes
from dymoe_runtime.text.tokenizer import Tokenizer
from dymoe_runtime.tools.bench import random_ids, time_tokens
from dymoe_runtime.tools.evaluate import Evaluation, evaluate, format_table, open_reference
from dymoe_runtime.tools.machine.measure import measure_rates
from dymoe_runtime.tools.machine.profile_file import check_target, write_profile
from dymoe_runtime.tools.probe import format_probe, probe

PROBE_CONTEXT = 512


def measure(bundle: Bundle, kernels: Kernels, flags: RunFlags) -> None:
    """Evaluate, time or probe, as the flags say."""
    if flags.eval_files:
        evaluate_files(bundle, kernels, flags)
    elif flags.bench:
        bench(bundle, kernels, flags)
    else:
        probe_machine(bundle, kernels, flags)


def bench(bundle: Bundle, kernels: Kernels, flags: RunFlags) -> None:
    """Time random tokens through prefill and decode; the keys of the result are a contract.

    Raises DymoeError if the tokens do not fit the model's context.
    """
    count = flags.prompt_tokens + flags.new_tokens
    if count > bundle.spec.max_context:
        raise DymoeError(
            f"--bench: {count} tokens do not fit the model's context of {bundle.spec.max_context}; "
            "give fewer --prompt-tokens or --new-tokens"
        )
    ids, others = random_ids(bundle.spec.vocab_size, count, flags.seed)
    with load(bundle, kernels, flags, count) as model:
        if flags.warm_up:
            model.prefill(others[: flags.prompt_tokens])
            model.reset()
            model.reset_stats()
        statistics = time_tokens(model, ids, flags.prompt_tokens)
        if flags.as_json:
            print_json(statistics)
        else:
            click.echo(format_statistics(statistics))
        model.remember()


def probe_machine(bundle: Bundle, kernels: Kernels, flags: RunFlags) -> None:
    """Measure this machine, and print the expected time per token of each operating point.

    With --write, the machine's rates become a profile. Raises DymoeError if they are implausible.
    """
    if flags.write is not None:
        check_target(flags.write, flags.overwrite)
    options = run_options(flags, min(PROBE_CONTEXT, bundle.spec.max_context))
    with load_model(bundle, replace(options, prefetch=False, preload=False), kernels) as model:
        result = probe(model)
        if flags.write is not None:
            rates, memory = measure_rates(model), model.budget.memory_bytes
            write_profile(flags.write, rates, bundle.manifest.ladder, memory, kernels.name, flags.overwrite)
            result["written"] = str(flags.write)
    if flags.as_json:
        print_json(result)
    else:
        click.echo(format_probe(result))
        if flags.write is not None:
            say(f"written to {flags.write}, for dymoe-compile --profile", err=True)


def evaluate_files(bundle: Bundle, kernels: Kernels, flags: RunFlags) -> None:
    """Score the texts of --eval; raise DymoeError if one has less than two tokens."""
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    texts = {name: tokenizer.encode(read_text(Path(name), "give text files to --eval")) for name in flags.eval_files}
    for name, ids in texts.items():
        bundle.spec.check_ids(ids)
        if len(ids) < 2:
            raise DymoeError(f"{name}: a single token has nothing to score; give longer text to --eval")
    length = flags.context or bundle.spec.max_context
    whole_table = flags.tiers == "auto" and flags.point is None and flags.quality is None and not flags.no_dynamic
    with ExitStack() as stack:
        window = min(length, max(map(len, texts.values())))
        options, reference = run_options(flags, length), None
        if flags.reference is not None:
            beside = open_reference(flags.reference, bundle.spec, kernels, window, flags.memory)
            reference, left, held = stack.enter_context(beside)
            memory = min(left, flags.memory or left)
            options = replace(options, memory_bytes=memory, uncounted_bytes=held)
        scorer = stack.enter_context(load_scorer(bundle, options, window, kernels))
        job = Evaluation(texts, length, flags.eval_phase == "prefill", reference)
        with progress_bar("eval", job.windows) as advance:
            result = evaluate(scorer, job, whole_table, advance)
        result |= {"peak_rss_bytes": peak_resident_bytes()}
    if flags.as_json:
        print_json(result)
    else:
        say(format_table(result))

"""What dymoe-run does: text, chats, scores and figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from dymoe_runtime import kernels
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.console import print_json, progress_bar
from dymoe_runtime.device import format_size
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.evaluate import Evaluation, evaluate, format_table, open_reference
from dymoe_runtime.files import read_text
from dymoe_runtime.generate import Token, generate
from dymoe_runtime.model import Model, check_ids
from dymoe_runtime.options import RunOptions, label_of
from dymoe_runtime.probe import format_probe, hold_pace, probe
from dymoe_runtime.sampling import SamplingParams
from dymoe_runtime.text import Tokenizer

CHAT_CONTEXT = 4096
PROBE_CONTEXT = 512


def execute(bundle: Path, o: dict[str, Any]) -> None:
    """What the flags ask for."""
    opened = Bundle.open(bundle)
    _say_if_slow()
    if o["eval_files"]:
        _evaluate(opened, o)
    elif o["bench"]:
        _bench(opened, o)
    elif o["probing"]:
        _probe(opened, o)
    elif o["chat"] and o["prompt"] is None and o["prompt_file"] is None:
        _converse(opened, o)
    else:
        _answer(opened, o)


def _run_options(o: dict[str, Any], context: int) -> RunOptions:
    return RunOptions(
        memory_bytes=o["memory"],
        arena_bytes=o["arena"],
        context=o["context"] or context,
        kv_bits=int(o["kv_bits"]),
        point=o["point"],
        quality=o["quality"],
        tier=None if o["tiers"] == "auto" else int(o["tiers"]),
        threads=o["threads"],
        pin_threads=o["pin_threads"],
        trace=o["trace"],
        decisions=o["decisions"],
        fade=o["fade"],
        eviction=o["eviction"],
        overlap=not o["no_overlap"],
        warm_set=o["warm_set"],
        latency=o["latency"],
        look_ahead=not o["no_look_ahead"],
        dynamic=not o["no_dynamic"],
        depth=not o["no_depth"],
    )


def _load(bundle: Bundle, o: dict[str, Any], context: int) -> Model:
    options = _run_options(o, context)
    model = Model(bundle, replace(options, preload=not o["no_preload"] and o["tpot"] is None))
    try:
        if o["tpot"] is not None:
            hold_pace(model, o["tpot"])
            if not o["no_preload"]:
                model.preload()
    except BaseException:
        model.close()
        raise
    return model


def _sampling(o: dict[str, Any]) -> SamplingParams:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return SamplingParams(**{name: o[name] for name in names})


def _answer(bundle: Bundle, o: dict[str, Any]) -> None:
    """Continue one prompt, or answer it by the chat template."""
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    prompt = _read_prompt(o)
    if o["chat"]:
        ids = tokenizer.encode(tokenizer.chat(_messages(o, prompt)), add_special_tokens=False)
    else:
        ids = tokenizer.encode(prompt)
    params = _sampling(o)
    with _load(bundle, o, len(ids) + o["max_tokens"]) as model:
        text, finish, timing = _stream(_generate(model, tokenizer, ids, params, o))
        statistics = model.statistics() | timing
        if o["stats"]:
            click.echo(format_statistics(statistics), err=True)
        if o["as_json"]:
            print_json({"text": text, "finish": finish, **statistics})
        model.remember()


def _converse(bundle: Bundle, o: dict[str, Any]) -> None:
    """A conversation on stdin; each turn reuses what the cache has of the turns before."""
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    messages = _messages(o)
    tokenizer.chat([*messages, {"role": "user", "content": ""}])
    params = _sampling(o)
    seen: list[int] = []
    statistics: dict[str, Any] = {}
    with _load(bundle, o, CHAT_CONTEXT) as model:
        for line in _turns():
            messages.append({"role": "user", "content": line})
            ids = tokenizer.encode(tokenizer.chat(messages), add_special_tokens=False)
            model.reset(min(_shared(seen, ids), len(ids) - 1))
            text, _, timing = _stream(_generate(model, tokenizer, ids[model.position :], params, o))
            messages.append({"role": "assistant", "content": text})
            seen = ids
            statistics = model.statistics() | timing
            if o["stats"]:
                click.echo(format_statistics(statistics), err=True)
        if o["as_json"]:
            print_json({"messages": messages, **statistics})
        model.remember()


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the prefix that a and b have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _turns() -> Iterator[str]:
    """Lines of stdin, prompted for on a terminal."""
    if sys.stdin is None:
        return
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        if line.strip():
            yield _decoded(line, "stdin").rstrip("\r\n")


def _messages(o: dict[str, Any], prompt: str | None = None) -> list[dict[str, str]]:
    system = [{"role": "system", "content": o["system"]}] if o["system"] else []
    return system + ([] if prompt is None else [{"role": "user", "content": prompt}])


def _generate(
    model: Model, tokenizer: Tokenizer, ids: Sequence[int], params: SamplingParams, o: dict[str, Any]
) -> Iterator[Token]:
    return generate(model, tokenizer, ids, params, o["max_tokens"], o["stop"], ignore_eos=o["ignore_eos"])


def _stream(tokens: Iterator[Token]) -> tuple[str, str, dict[str, float]]:
    """Print tokens as they come; the text, why it ended, and the times to the first and per further token."""
    started = time.perf_counter()
    arrived: list[float] = []
    text, finish = "", ""
    for token in tokens:
        arrived.append(time.perf_counter())
        text += token.text
        click.echo(token.text, nl=False)
        finish = token.finish or finish
    click.echo("")
    first = arrived[0] - started if arrived else 0.0
    per_token = (arrived[-1] - arrived[0]) / (len(arrived) - 1) if len(arrived) > 1 else 0.0
    return text, finish, {"ttft_s": first, "tpot_s": per_token}


def _read_prompt(o: dict[str, Any]) -> str:
    """The prompt, from the flag, the file or stdin."""
    path: Path | None = o["prompt_file"]
    if o["prompt"] is not None:
        return str(o["prompt"])
    if path is not None and str(path) != "-":
        return read_text(path, "give the prompt's file with --prompt-file")
    if sys.stdin is None or (path is None and sys.stdin.isatty()):
        raise click.UsageError("give --prompt TEXT, --prompt-file FILE, --chat, or a prompt on stdin")
    return _decoded(sys.stdin.buffer.read(), "stdin")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DymoeError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error


def _bench(bundle: Bundle, o: dict[str, Any]) -> None:
    """Random tokens through prefill and decode; the keys of the result are a contract."""
    count = o["prompt_tokens"] + o["new_tokens"]
    if count > bundle.spec.max_context:
        raise DymoeError(
            f"--bench: {count} tokens do not fit the model's context of {bundle.spec.max_context}; "
            "give fewer --prompt-tokens or --new-tokens"
        )
    random = np.random.default_rng(o["seed"])
    ids, others = (random.integers(bundle.spec.vocab_size, size=count).tolist() for _ in range(2))
    with _load(bundle, o, count) as model:
        if o["warm_up"]:
            model.prefill(others[: o["prompt_tokens"]])
            model.reset()
            model.reset_stats()
        started = time.perf_counter()
        model.prefill(ids[: o["prompt_tokens"]])
        first, read = time.perf_counter() - started, model.store.stats.read_bytes
        for token_id in ids[o["prompt_tokens"] :]:
            model.decode(token_id)
        statistics = model.statistics()
        statistics |= {
            "ttft_s": first,
            "tpot_s": model.stats.decode.seconds / o["new_tokens"],
            "decode_read_bytes_per_token": (model.store.stats.read_bytes - read) / o["new_tokens"],
        }
        if o["as_json"]:
            print_json(statistics)
        else:
            click.echo(format_statistics(statistics))
        model.remember()


def _probe(bundle: Bundle, o: dict[str, Any]) -> None:
    with Model(bundle, _run_options(o | {"no_look_ahead": True}, PROBE_CONTEXT)) as model:
        result = probe(model)
    if o["as_json"]:
        print_json(result)
    else:
        click.echo(format_probe(result))


def _evaluate(bundle: Bundle, o: dict[str, Any]) -> None:
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    texts = {name: tokenizer.encode(read_text(Path(name), "give text files to --eval")) for name in o["eval_files"]}
    for name, ids in texts.items():
        check_ids(ids, bundle.spec)
        if len(ids) < 2:
            raise DymoeError(f"{name}: a single token has nothing to score; give longer text to --eval")
    length = min(o["context"] or bundle.spec.max_context, bundle.spec.max_context)
    whole_table = o["tiers"] == "auto" and o["point"] is o["quality"] is None and not o["no_dynamic"]
    with ExitStack() as stack:
        path: Path | None = o["reference"]
        window = min(length, max(map(len, texts.values())))
        options, reference = _run_options(o, length), None
        if path is not None:
            reference, left, held = stack.enter_context(open_reference(path, bundle.spec, window, o["memory"]))
            options = replace(options, memory_bytes=min(left, o["memory"] or left), beside_bytes=held)
        model = stack.enter_context(Model(bundle, options, window))
        job = Evaluation(texts, length, o["eval_phase"] == "prefill", reference)
        with progress_bar("eval", job.windows) as advance:
            result = evaluate(model, job, whole_table, advance)
        result |= {"peak_rss_bytes": model.statistics()["peak_rss_bytes"]}
    if o["as_json"]:
        print_json(result)
    else:
        click.echo(format_table(result))


def format_statistics(s: dict[str, Any]) -> str:
    """What a run cost and what each mechanism did, in a few lines."""
    shares = ", ".join(f"{tier} bits {share:.0%}" for tier, share in s["tier_shares"].items())
    ahead = s["look_ahead"]
    return "\n".join(
        (
            f"precision   {label_of(s['point'])}: {s['bits_mean']:.2f} bits per active expert ({shares})",
            f"experts     {format_size(s['read_bytes'])} read, {format_size(s['read_bytes_per_token'])} per token, "
            f"hit rate {s['hit_rate']:.1%}, {s['evictions']} evictions, "
            f"{format_size(s['resident_bytes'])} resident of {format_size(s['arena_bytes'])}",
            f"look-ahead  {ahead['reads']} reads, {format_size(ahead['bytes'])}: "
            f"{ahead['hits']} used, {ahead['waste']} not",
            f"speed       prompt {s['prompt_tokens']} tokens at {s['prompt_tokens_per_s']:.1f}/s, "
            f"first token after {s['ttft_s']:.2f} s, then {s['tokens_per_s']:.1f} tokens/s",
            f"memory      peak {format_size(s['peak_rss_bytes'])}, budget {format_size(s['memory_bytes'])}, "
            f"least that works {format_size(s['floor_bytes'])}",
        )
    )


def _say_if_slow() -> None:
    if kernels.isa() == kernels.REFERENCE and kernels.missing_reason:
        click.echo(f"note: {kernels.missing_reason}", err=True)

"""dymoe-run on text: it continues a prompt, answers one, or holds a conversation."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.cli.load import format_statistics, load, run_options
from dymoe_runtime.cli.run_flags import RunFlags
from dymoe_runtime.console import print_json
from dymoe_runtime.engine.model import Model
from dymoe_runtime.errors import DymoeError, importing
from dymoe_runtime.files import read_text
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.text.generate import Token, generate
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.session import Session
from dymoe_runtime.text.tokenizer import Tokenizer

CHAT_CONTEXT = 4096


def respond(bundle: Bundle, kernels: Kernels, flags: RunFlags) -> None:
    """Answer once, or hold a conversation, as the flags say."""
    if flags.chat and flags.prompt is None and flags.prompt_file is None:
        converse(bundle, kernels, flags)
    else:
        answer(bundle, kernels, flags)


def answer(bundle: Bundle, kernels: Kernels, flags: RunFlags) -> None:
    """Continue one prompt, or answer it by the chat template."""
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    prompt = _read_prompt(flags)
    if flags.chat:
        ids = tokenizer.encode(tokenizer.chat(_messages(flags, prompt)), add_special_tokens=False)
    else:
        ids = tokenizer.encode(prompt)
    params = _sampling(flags)
    with load(bundle, kernels, flags, len(ids) + flags.max_tokens) as model:
        text, finish, timing = _stream(_generate(model, tokenizer, ids, params, flags), flags)
        statistics = model.statistics() | timing
        if flags.stats:
            click.echo(format_statistics(statistics), err=True)
        if flags.as_json:
            print_json({"text": text, "finish": finish, **statistics})
        model.remember()


def converse(bundle: Bundle, kernels: Kernels, flags: RunFlags) -> None:
    """Hold a conversation on stdin."""
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    tokenizer.chat([*_messages(flags), {"role": "user", "content": ""}])  # fails early without a template
    params = _sampling(flags)
    if _on_terminal(flags):
        converse_on_terminal(bundle, kernels, flags, tokenizer, params)
        return
    statistics: dict[str, Any] = {}
    with load(bundle, kernels, flags, CHAT_CONTEXT) as model:
        session = Session(model, tokenizer, flags.system, params=params)
        try:
            for line in _turns():
                reply = session.reply(line, flags.max_tokens, flags.stop, flags.ignore_eos)
                _, _, timing = _stream(reply, flags)
                statistics = model.statistics() | timing
                if flags.stats:
                    click.echo(format_statistics(statistics), err=True)
        finally:  # what was said is not lost where a turn fails
            if flags.as_json:
                print_json({"messages": session.messages, **statistics})
        model.remember()


def converse_on_terminal(
    bundle: Bundle, kernels: Kernels, flags: RunFlags, tokenizer: Tokenizer, params: SamplingParams
) -> None:
    """Hold a conversation on a terminal, with line editing and commands."""
    with importing():  # before the model, so that the budget counts what it takes
        from dymoe_runtime.cli.chat.conversation import Conversation
        from dymoe_runtime.cli.chat.loop import interact, prepare

        prepare()

    def begin(system: str | None, history: Sequence[dict[str, str]], params: SamplingParams) -> Session:
        return Session(model, tokenizer, system, history=history, params=params)

    with load(bundle, kernels, flags, CHAT_CONTEXT) as model:
        options = run_options(flags, model.max_context)
        interact(Conversation(model, options, flags, params, begin, format_statistics))
        model.remember()


def _on_terminal(flags: RunFlags) -> bool:
    return not flags.as_json and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def _sampling(flags: RunFlags) -> SamplingParams:
    return SamplingParams(
        flags.temperature, flags.top_k, flags.top_p, flags.min_p, flags.repetition_penalty, flags.seed
    )


def _turns() -> Iterator[str]:
    """Yield the lines of stdin that are not blank; prompt for each on a terminal."""
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


def _messages(flags: RunFlags, prompt: str | None = None) -> list[dict[str, str]]:
    system = [{"role": "system", "content": flags.system}] if flags.system else []
    return system + ([] if prompt is None else [{"role": "user", "content": prompt}])


def _generate(
    model: Model, tokenizer: Tokenizer, ids: Sequence[int], params: SamplingParams, flags: RunFlags
) -> Iterator[Token]:
    return generate(model, tokenizer, ids, params, flags.max_tokens, flags.stop, ignore_eos=flags.ignore_eos)


def _stream(tokens: Iterator[Token], flags: RunFlags) -> tuple[str, str, dict[str, float]]:
    """Print tokens as they come, unless JSON is wanted.

    Returns (text, finish reason, times). The times are the seconds to the first token and per further token.
    """
    started = time.perf_counter()
    arrived: list[float] = []
    text, finish = "", ""
    for token in tokens:
        arrived.append(time.perf_counter())
        text += token.text
        if not flags.as_json:
            click.echo(token.text, nl=False)
        finish = token.finish or finish
    if not flags.as_json:
        click.echo("")
    first = arrived[0] - started if arrived else 0.0
    per_token = (arrived[-1] - arrived[0]) / (len(arrived) - 1) if len(arrived) > 1 else 0.0
    return text, finish, {"ttft_s": first, "tpot_s": per_token}


def _read_prompt(flags: RunFlags) -> str:
    """Return the prompt, from the flag, the file or stdin."""
    path = flags.prompt_file
    if flags.prompt is not None:
        return flags.prompt
    if path is not None and str(path) != "-":
        return read_text(path, "give the prompt's file with --prompt-file")
    if sys.stdin is None or (path is None and sys.stdin.isatty()):
        raise click.UsageError("give --prompt TEXT, --prompt-file FILE, --chat, or a prompt on stdin")
    return _decoded(sys.stdin.buffer.read(), "stdin")


def _decoded(data: bytes, where: str) -> str:
    """Return the text of `data`, read as `read_text` reads a file, whatever ends its lines."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DymoeError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error

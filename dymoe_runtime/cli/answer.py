"""dymoe-run on text: it continues a prompt, answers one, or holds a conversation."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.cli.load import format_statistics, load, run_options
from dymoe_runtime.cli.output import Answer, say_cut, say_dropped, show
from dymoe_runtime.cli.run_flags import RunFlags
from dymoe_runtime.cli.sampling_flags import grammar, sampling, template_variables
from dymoe_runtime.console import print_json
from dymoe_runtime.engine.load import DEFAULT_CONTEXT
from dymoe_runtime.engine.model import Model
from dymoe_runtime.engine.saved.state_file import saved_context
from dymoe_runtime.errors import DymoeError, importing
from dymoe_runtime.files import MAX_TEXT_BYTES, decode_text, read_text
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.prefix import shared_prefix
from dymoe_runtime.text.constraints import Grammar
from dymoe_runtime.text.generate import Token, generate
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.session import Session
from dymoe_runtime.text.tokenizer import Tokenizer


def respond(bundle: Bundle, kernels: Kernels, flags: RunFlags) -> None:
    """Answer once, or hold a conversation, as the flags say."""
    if flags.session is not None:
        check_place(flags.session)
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    params = sampling(tokenizer, flags)
    rules = grammar(tokenizer, flags)  # before the model, so that the budget counts what it takes
    if not flags.chat:
        complete(bundle, kernels, flags, tokenizer, params, rules)
        return
    variables = template_variables(tokenizer, flags)
    once = flags.prompt is not None or flags.prompt_file is not None
    prompt = _read_prompt(flags) if once else ""
    interactive = not once and on_terminal(flags)
    if interactive:
        with importing():  # before the model, so that the budget counts what it takes
            from dymoe_runtime.cli.chat.conversation import Conversation
            from dymoe_runtime.cli.chat.loop import interact, prepare

            prepare()
    head = [{"role": "system", "content": flags.system}] if flags.system else []
    begun = tokenizer.chat([*head, {"role": "user", "content": prompt}], **variables)
    size = len(tokenizer.encode(begun, add_special_tokens=False))
    room = max(DEFAULT_CONTEXT, size + (flags.max_tokens or DEFAULT_CONTEXT), _kept_context(flags))
    with load(bundle, kernels, flags, room) as model:

        def begin(system: str | None, history: Sequence[dict[str, str]], params: SamplingParams) -> Session:
            return Session(
                model,
                tokenizer,
                system,
                history=history,
                params=params,
                variables=variables,
                context_policy=flags.context_policy,
                grammar=rules,
            )

        session = begin(flags.system, (), params)
        if flags.session is not None and flags.session.exists():
            note = model.load_state(flags.session)
            if note:  # none was written by a prompt without a conversation
                session.restore(note)
            if flags.system:
                session.set_system(flags.system)
        if interactive:
            options = run_options(flags, model.max_context)
            conversation = Conversation(model, options, flags, session, begin, format_statistics)
            try:
                interact(conversation)
            finally:
                keep(conversation.session, model, flags)
        else:
            converse(session, model, iter([prompt]) if once else _turns(), flags, once)
        model.remember()


def on_terminal(flags: RunFlags) -> bool:
    """Return whether somebody sits at the terminal and reads the answers there."""
    return not flags.as_json and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def keep(session: Session, model: Model, flags: RunFlags) -> None:
    """Write the file of --session, if there is one."""
    if flags.session is not None:
        model.save_state(flags.session, session.to_json())


def complete(
    bundle: Bundle,
    kernels: Kernels,
    flags: RunFlags,
    tokenizer: Tokenizer,
    params: SamplingParams,
    rules: Grammar | None,
) -> None:
    """Continue one prompt, by the rules of a grammar if there is one."""
    ids = tokenizer.encode(_read_prompt(flags))
    room = max(len(ids) + (flags.max_tokens or DEFAULT_CONTEXT), _kept_context(flags))
    with load(bundle, kernels, flags, room) as model:
        note = model.load_state(flags.session) if flags.session is not None and flags.session.exists() else ""
        answer = show(_continue(model, tokenizer, ids, params, flags, rules), flags)
        say_cut(answer, model.max_context, flags)
        statistics = model.statistics() | answer.timing | {"sampling": params.to_json()}
        if flags.stats:
            click.echo(format_statistics(statistics), err=True)
        if flags.as_json:
            print_json({"text": answer.text, "finish": answer.finish, **statistics})
        if flags.session is not None:
            model.save_state(flags.session, note)
        model.remember()


def _kept_context(flags: RunFlags) -> int:
    """Return the context in tokens of the run that wrote the file of --session; 0 if there is none."""
    return saved_context(flags.session) if flags.session is not None and flags.session.exists() else 0


def _continue(
    model: Model,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    params: SamplingParams,
    flags: RunFlags,
    rules: Grammar | None,
) -> Generator[Token, None, None]:
    """Return the tokens that follow `ids`; what a saved state holds of these is not computed again."""
    kept = model.reset(min(shared_prefix(model.tokens, ids), len(ids) - 1)) if ids else 0
    before, new = ids[:kept], ids[kept:]
    return generate(
        model,
        tokenizer,
        new,
        params,
        flags.max_tokens,
        flags.stop,
        flags.ignore_eos,
        before,
        constraint=None if rules is None else rules.constraint(),
    )


def converse(session: Session, model: Model, prompts: Iterator[str], flags: RunFlags, once: bool) -> None:
    """Answer prompts; with `once` the JSON object has the answer's text, otherwise all messages."""
    statistics: dict[str, Any] = {}
    turns: list[dict[str, Any]] = []
    answer = Answer()
    try:
        for prompt in prompts:
            dropped = session.dropped_turns
            reply = session.reply(prompt, None, flags.max_tokens, flags.stop, flags.ignore_eos)
            with closing(reply):  # where showing it fails, the session keeps what was answered so far
                answer = show(reply, flags)
            if session.dropped_turns and not dropped:
                say_dropped(model.max_context)
            say_cut(answer, model.max_context, flags)
            statistics = model.statistics() | answer.timing | {"sampling": session.params.to_json()}
            turns += [session.last_turn.to_json()] if session.last_turn is not None else []
            if flags.stats:
                click.echo(format_statistics(statistics | {"turn": session.last_turn}), err=True)
    finally:  # what was said is not lost where a turn fails
        unanswered = {} if session.unanswered is None else {"unanswered": session.unanswered}
        said = {"messages": session.messages, "turns": turns, **unanswered}
        if flags.as_json and once:
            said |= {"text": answer.text, "finish": answer.finish}
            said |= {"reasoning": answer.reasoning} if answer.reasoning else {}
        if flags.as_json:
            print_json({**said, **statistics})
        keep(session, model, flags)


def check_place(path: Path) -> None:
    """Raise DymoeError if a session cannot be saved at `path`, before there is one to lose."""
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "is not writable" if folder.is_dir() else "does not exist"
        raise DymoeError(f"--session {path}: the session cannot be saved there, {folder} {what}; give another file")


def _turns() -> Iterator[str]:
    """Yield the lines of stdin that are not blank; prompt for each on a terminal."""
    encoding = "utf-8-sig"  # only what begins the first line is a byte order mark
    while sys.stdin is not None:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        text = _decoded(line, encoding).rstrip("\n")
        encoding = "utf-8"
        if text.strip():
            yield text


def _read_prompt(flags: RunFlags) -> str:
    """Return the prompt, from the flag, the file or stdin."""
    path = flags.prompt_file
    if flags.prompt is not None:
        return flags.prompt
    if path is not None and str(path) != "-":
        return read_text(path, "give the prompt's file with --prompt-file")
    if sys.stdin is None or (path is None and sys.stdin.isatty()):
        raise click.UsageError("give --prompt TEXT, --prompt-file FILE, --chat, or a prompt on stdin")
    return decode_text(sys.stdin.buffer.read(MAX_TEXT_BYTES + 1), Path("stdin"), "give it a prompt")


def _decoded(line: bytes, encoding: str) -> str:
    """Return the text of a line of stdin, read as `read_text` reads a file, whatever ends its lines."""
    try:
        return line.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DymoeError(f"stdin: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error

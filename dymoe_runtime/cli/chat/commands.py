"""The commands of a conversation: a line that begins with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dymoe_runtime.cli.chat.conversation import Conversation
from dymoe_runtime.engine.options import label_of
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.process import resident_bytes
from dymoe_runtime.text.generate import Token
from dymoe_runtime.text.sampling import LIMITS, WHOLE_NUMBERS
from dymoe_runtime.units import format_size

# Ends a system message, and replaces a file.
NONE, REPLACE = "-", "--replace"
KEYS = """\
Enter sends; Alt-Enter, or a backslash before Enter, begins another line.
Ctrl-C stops an answer or clears the line; at an empty prompt twice, it ends.
Ctrl-D at an empty prompt ends. Up and down: earlier lines. Ctrl-R: search.
A message that begins with a slash: write the slash twice."""


class Command(NamedTuple):
    """A command; `run` returns the text to show, or the tokens of an answer."""

    argument: str
    help: str
    run: Callable[[Conversation, str], str | Iterator[Token]]


def execute(line: str, conversation: Conversation) -> str | Iterator[Token]:
    """Run a line that begins with a slash; return the text to show, or the tokens of an answer.

    Raises DymoeError if there is no such command or it cannot be done, and EOFError to end the conversation.
    """
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else "/help lists them"
        raise DymoeError(f"there is no command {_short(name)}; {advice} (a message may begin with //)")
    argument = argument.strip()
    if argument and not command.argument:
        raise DymoeError(f"{name} takes nothing after it, not {_short(argument)}")
    return command.run(conversation, argument)


def _help(conversation: Conversation, argument: str) -> str:
    names = [f"{name} {command.argument}".rstrip() for name, command in COMMANDS.items()]
    width = max(map(len, names)) + 2
    lines = [f"{name:<{width}}{command.help}" for name, command in zip(names, COMMANDS.values(), strict=True)]
    return "\n".join([*lines, KEYS])


def _statistics(conversation: Conversation, argument: str) -> str:
    return conversation.statistics()


def _memory(conversation: Conversation, argument: str) -> str:
    model = conversation.model
    budget, s = model.budget, model.statistics()
    return "\n".join(
        (
            f"budget    {format_size(budget.memory_bytes)}, least that works {format_size(budget.floor_bytes)}",
            f"process   {format_size(resident_bytes())} now, {format_size(s['peak_rss_bytes'])} at most so far",
            f"experts   {format_size(s['resident_bytes'])} resident of an arena of {format_size(s['arena_bytes'])}",
            f"dense     {format_size(budget.dense_bytes)}",
            f"KV cache  {format_size(budget.state_bytes)} for {model.max_context} tokens, {model.position} used",
        )
    )


def _point(conversation: Conversation, argument: str) -> str:
    model = conversation.model
    if argument:
        note = conversation.use_point(argument)
        return note or f"{label_of(model.point)} from the next token on"
    points = model.bundle.policy.points
    lines = [
        f"{'*' if p.name == model.point else ' '} {p.name:<12}{p.bits_mean:.2f} bits per active expert" for p in points
    ]
    others = [] if model.point in {p.name for p in points} else [f"* {model.point}"]
    return "\n".join([*others, *lines])


def _save(conversation: Conversation, argument: str) -> str:
    overwrite = f"{argument} ".startswith(f"{REPLACE} ")
    path = _path(argument.removeprefix(REPLACE) if overwrite else argument, "/save")
    conversation.save(path, overwrite)
    return f"{len(conversation.session.messages)} messages saved to {path}"


def _load(conversation: Conversation, argument: str) -> str:
    path = _path(argument, "/load")
    conversation.load(path)
    return f"{len(conversation.session.messages)} messages loaded from {path}"


def _system(conversation: Conversation, argument: str) -> str:
    if not argument:
        return conversation.system or "there is no system message"
    conversation.session.set_system(None if argument == NONE else argument)
    return "the system message is set" if argument != NONE else "there is no system message now"


def _set(conversation: Conversation, argument: str) -> str:
    values = _settings(conversation)
    if argument:
        name, _, text = argument.replace("=", " ", 1).partition(" ")
        field = name.strip().replace("-", "_")
        if field not in values or not text.strip():
            raise DymoeError(f"/set takes a name and a value, such as temperature 0.7; names are {', '.join(values)}")
        try:
            conversation.sample(**{field: _number(text.strip(), field)})
        except DymoeError as error:
            raise DymoeError(f"/set {str(error).removeprefix('--').removeprefix('/set ')}") from error
        values = _settings(conversation)
    return "\n".join(f"{name:<20}{value:g}" for name, value in values.items())


def _settings(conversation: Conversation) -> dict[str, float]:
    return {name: getattr(conversation.params, name) for name in LIMITS}


def _retry(conversation: Conversation, argument: str) -> Iterator[Token]:
    return conversation.retry()


def _clear(conversation: Conversation, argument: str) -> str:
    conversation.session.clear()
    return "the conversation is forgotten" + ("; the system message stays" if conversation.system else "")


def _exit(conversation: Conversation, argument: str) -> str:
    raise EOFError


COMMANDS = {
    "/help": Command("", "This list.", _help),
    "/stats": Command("", "Statistics of the run and of the last turn.", _statistics),
    "/memory": Command("", "Where the memory goes.", _memory),
    "/point": Command("[NAME]", "Show the operating points, or run another.", _point),
    "/set": Command("[NAME VALUE]", "Show the sampling, or change it: temperature 0.7.", _set),
    "/system": Command("[TEXT]", f"Show the system message, or set it; {NONE} removes it.", _system),
    "/retry": Command("", "Answer the last question again.", _retry),
    "/clear": Command("", "Forget the conversation.", _clear),
    "/save": Command("FILE", f"Write the conversation to a file; {REPLACE} FILE replaces one.", _save),
    "/load": Command("FILE", "Go on with a conversation from a file.", _load),
    "/exit": Command("", "End.", _exit),
}


def _path(argument: str, command: str) -> Path:
    if not argument.strip():
        raise DymoeError(f"{command} needs a file, such as {command} chat.json")
    try:
        return Path(argument.strip()).expanduser()
    except RuntimeError as error:  # ~ of nobody
        raise DymoeError(f"{argument.strip()}: {error}; give the whole path") from error


def _number(text: str, field: str) -> float | int:
    try:
        return int(text) if field in WHOLE_NUMBERS else float(text)
    except ValueError as error:
        kind = "a whole number" if field in WHOLE_NUMBERS else "a number"
        raise DymoeError(f"/set {field} {_short(text)}: expected {kind}") from error


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."

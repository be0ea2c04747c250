"""What dymoe-run prints of an answer: its text as it comes, and notes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import click

from dymoe_runtime.cli.run_flags import RunFlags
from dymoe_runtime.text.generate import Token


@dataclass
class Answer:
    """An answer that was shown, and when its tokens came."""

    text: str = ""
    reasoning: str = ""
    finish: str = ""
    started: float = field(default_factory=time.perf_counter)
    arrived: list[float] = field(default_factory=list)

    def add(self, token: Token) -> None:
        """Take the next token."""
        self.arrived.append(time.perf_counter())
        self.text += token.text
        self.reasoning += token.reasoning
        self.finish = token.finish or self.finish

    @property
    def timing(self) -> dict[str, float]:
        """Return the seconds to the first token, and per further token."""
        arrived = self.arrived
        first = arrived[0] - self.started if arrived else 0.0
        per_token = (arrived[-1] - arrived[0]) / (len(arrived) - 1) if len(arrived) > 1 else 0.0
        return {"ttft_s": first, "tpot_s": per_token}


def show(tokens: Iterator[Token], flags: RunFlags) -> Answer:
    """Print tokens as they come, unless JSON is wanted; return the answer.

    Reasoning is dimmed on a terminal. Elsewhere it goes to stderr, so that stdout has the answer alone.
    """
    answer, quiet = Answer(), flags.as_json
    terminal = sys.stdout is not None and sys.stdout.isatty()
    thinking = False
    for token in tokens:
        answer.add(token)
        if quiet:
            continue
        if token.reasoning and flags.reasoning == "show":
            click.echo(dimmed(token.reasoning) if terminal else token.reasoning, nl=False, err=not terminal)
            thinking = True
        if token.text:
            if thinking:
                click.echo("\n", err=not terminal)
                thinking = False
            click.echo(token.text, nl=False)
    if not quiet:
        if thinking and not terminal:
            click.echo("", err=True)
        click.echo("")
    return answer


def dimmed(text: str) -> str:
    """Return `text` dimmed, unless the terminal or the user does without colours."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return text if plain else click.style(text, dim=True)


def say_cut(answer: Answer, max_context: int, flags: RunFlags) -> None:
    """Print a note on stderr if a limit has ended the answer; with JSON its `finish` says so."""
    if answer.finish == "length" and not flags.as_json:
        count = len(answer.arrived)
        why = "--max-tokens" if count == flags.max_tokens else f"the context of {max_context} tokens is full"
        click.echo(f"note: cut at {count} tokens ({why})", err=True)


def say_dropped(max_context: int) -> None:
    """Print a note on stderr that the oldest turns have left the context."""
    click.echo(
        f"note: the conversation fills the context of {max_context} tokens, so its oldest turns leave it; "
        "a larger --context keeps more, --context-policy stop ends instead",
        err=True,
    )

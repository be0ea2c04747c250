"""The loop of a conversation on a terminal: read a line, answer it or run it as a command, until the user leaves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Protocol

import click

from dymoe_runtime.cli.chat.commands import COMMANDS, execute
from dymoe_runtime.cli.chat.conversation import Conversation
from dymoe_runtime.cli.chat.display import Display
from dymoe_runtime.cli.chat.terminal import LAST_INTERRUPT, Terminal, is_plain
from dymoe_runtime.console import Terminated
from dymoe_runtime.engine.options import label_of
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.generate import Token

HOW_TO_LEAVE = "Ctrl-C again, Ctrl-D or /exit ends"


class Lines(Protocol):
    """What reads messages."""

    def read(self) -> str:
        """Return the next message; raise EOFError to end, and KeyboardInterrupt on Ctrl-C at an empty prompt."""


def prepare() -> None:
    """Import what reads lines; call it before the model is loaded, so that the memory budget counts it."""
    if not is_plain():
        from dymoe_runtime.cli.chat import edited_lines  # noqa: F401


def interact(conversation: Conversation) -> None:
    """Hold a conversation on the terminal until the user leaves it; messages go into `conversation.session`.

    Raises Terminated on SIGTERM, and KeyboardInterrupt if an answer does not stop. The terminal is as before then.
    """
    with Terminal() as terminal:
        conversation.model.interrupt_when(lambda: terminal.interrupts > 0)
        try:
            _Loop(conversation, terminal).run()
        finally:
            conversation.model.interrupt_when(lambda: False)


class _Loop:
    def __init__(self, conversation: Conversation, terminal: Terminal) -> None:
        styles = not os.environ.get("NO_COLOR")
        show_reasoning = conversation.flags.reasoning != "hide"
        self._conversation, self._terminal = conversation, terminal
        self._display = Display(sys.stdout, terminal.plain, styles, show_reasoning)
        self._lines = _lines(terminal)
        self._told_of_dropped = False

    def run(self) -> None:
        model = self._conversation.model
        self._display.note(f"{label_of(model.point)}, {model.max_context} tokens of context; /help lists commands")
        leaving = False  # whether the user has been told how to leave just now
        while True:
            try:
                text = self._lines.read()
                leaving = False
                self._heed(text)
            except EOFError:
                return
            except Terminated:
                raise
            except KeyboardInterrupt:
                if self._terminal.interrupts >= LAST_INTERRUPT:
                    raise
                if leaving:
                    return
                leaving = True
                self._display.note(HOW_TO_LEAVE)
            except DymoeError as error:
                self._display.print(f"error: {' '.join(str(error).split())}")

    def _heed(self, text: str) -> None:
        """Answer a message or run a command."""
        if not text.strip():
            return
        if not text.startswith("/") or text.startswith("//"):
            self._answer(self._conversation.ask(text[1:] if text.startswith("//") else text))
            return
        shown = execute(text, self._conversation)
        if isinstance(shown, str):
            self._display.print(shown)
        else:
            self._answer(shown)

    def _answer(self, tokens: Iterator[Token]) -> None:
        """Show an answer until it ends or the user interrupts it."""
        finish, count = None, 0
        try:
            finish, count = self._stream(tokens)
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Terminated) or self._terminal.interrupts >= LAST_INTERRUPT:
                raise
        finally:
            self._display.end_answer()
        if finish is None:
            self._display.note("stopped")
        elif finish == "length":
            self._display.note(self._cut(count))
        self._tell_of_dropped()
        if self._conversation.flags.stats:
            click.echo(self._conversation.statistics(), err=True)

    def _stream(self, tokens: Iterator[Token]) -> tuple[str | None, int]:
        """Show tokens; return why they ended, None if the user stopped them, and how many there were."""
        finish, count = None, 0
        try:
            for token in tokens:
                self._display.show(token)
                finish, count = token.finish, count + 1
                if self._terminal.interrupts:
                    break
        finally:
            tokens.close()  # type: ignore[attr-defined]
        return finish, count

    def _cut(self, count: int) -> str:
        most = self._conversation.flags.max_tokens
        if most is not None and count >= most:
            return f"cut at {count} tokens, the limit of --max-tokens"
        return f"cut at {count} tokens: the context of {self._conversation.model.max_context} is full"

    def _tell_of_dropped(self) -> None:
        if self._conversation.session.dropped_turns and not self._told_of_dropped:
            self._told_of_dropped = True
            self._display.note("the context is full: from now on the model forgets the oldest turns; /save has them")


def _lines(terminal: Terminal) -> Lines:
    if terminal.plain:
        from dymoe_runtime.cli.chat.plain_lines import PlainLines

        return PlainLines(terminal)
    from dymoe_runtime.cli.chat.edited_lines import EditedLines  # takes 10 MB and 0.1 s

    return EditedLines(terminal, list(COMMANDS))

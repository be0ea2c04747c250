"""Reading of messages with line editing, history and completion."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle, PromptSession

from dymoe_runtime.cli.chat.terminal import Terminal

PROMPT, CONTINUATION = "> ", "  "


class EditedLines:
    """Messages of one or more lines, edited with the keys of Emacs or of the arrows."""

    def __init__(self, terminal: Terminal, commands: Sequence[str]) -> None:
        """Complete `commands`, which begin with a slash."""
        self._terminal = terminal
        self._input = create_input(sys.stdin)
        self._output = _Output.from_pty(sys.stdout, term=os.environ.get("TERM"))
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUATION,
            history=open_history(history_path()),
            completer=CommandCompleter(commands),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=self._keys(),
            input=self._input,
            output=self._output,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._suspending = False  # whether a key has stopped the program

    def read(self) -> str:
        """Return the next message; raise EOFError on Ctrl-D, and KeyboardInterrupt on Ctrl-C at an empty prompt."""
        with self._terminal.prompting(self._interrupted, self._redraw):
            try:
                return self._session.prompt(handle_sigint=False, pre_run=self._began)
            finally:
                self._loop = None
                self._heed_interrupt_typed_ahead()

    def _began(self) -> None:
        self._loop = asyncio.get_running_loop()

    def _interrupted(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._session.app.key_processor.send_sigint)

    def _redraw(self) -> None:
        if self._suspending:
            self._suspending = False
        elif self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._draw_again)

    def _draw_again(self) -> None:
        self._session.app.renderer.reset()
        self._session.app.invalidate()

    def _heed_interrupt_typed_ahead(self) -> None:
        """Let a Ctrl-C that was typed just after a message stop its answer."""
        keys = get_typeahead(self._input)
        pressed = [press.key for press in keys]
        if Keys.ControlC in pressed:
            keys = keys[pressed.index(Keys.ControlC) + 1 :]
            self._terminal.interrupt()
        store_typeahead(self._input, keys)

    def _keys(self) -> KeyBindings:
        keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)  # not searching

        @keys.add("enter", filter=typing)
        def _send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=typing)
        def _break_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c", filter=typing)
        @keys.add("<sigint>")
        def _clear(event: KeyPressEvent) -> None:
            self._terminal.take_interrupts()
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt)

        @keys.add("c-z")
        def _suspend(event: KeyPressEvent) -> None:
            self._suspending = True
            event.app.suspend_to_background()  # the whole job, as the terminal does it; it draws the prompt again

        return keys


class _Output(Vt100_Output):
    """Never asks for the cursor's position: not all terminals answer, and answers mix with what is typed ahead."""

    @property
    def responds_to_cpr(self) -> bool:
        return False


class CommandCompleter(Completer):
    """Completes the names of commands."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/"):
            for name in self._commands:
                if name.startswith(typed):
                    yield Completion(name, start_position=-len(typed))


class _KeptHistory(FileHistory):
    """A history in a file; what cannot be written is remembered until the program ends."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def history_path() -> Path:
    """Return the file of the history, as the XDG base directory specification places it."""
    folder = os.environ.get("XDG_STATE_HOME", "")
    # The specification says to ignore relative paths.
    home = Path(folder) if os.path.isabs(folder) else Path.home() / ".local" / "state"
    return home / "dymoe" / "history"


def open_history(path: Path) -> History:
    """Return the history in a file that only its owner reads; one in memory if it cannot be had."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        return _KeptHistory(str(path))
    except OSError:
        return InMemoryHistory()

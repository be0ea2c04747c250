"""Reading of messages on a terminal that knows no escape codes: the system edits the line."""

from __future__ import annotations

import select
import sys

from dymoe_runtime.cli.chat.terminal import Terminal
from dymoe_runtime.errors import DymoeError

PROMPT, CONTINUATION = "> ", "  "


class PlainLines:
    """Messages of one line each; a backslash at the end of a line continues it."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def read(self) -> str:
        """Return the next message.

        Raises EOFError at the end of the input, KeyboardInterrupt on Ctrl-C, and DymoeError if it is not UTF-8.
        """
        lines = [self._line(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line(CONTINUATION))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        typed_ahead = bool(select.select([sys.stdin], [], [], 0)[0])
        try:
            with self._terminal.prompting(_interrupt), self._terminal.echoing():
                sys.stdout.write(prompt)  # only now, because whoever sees it may type at once
                sys.stdout.flush()
                line = sys.stdin.buffer.readline()
        except KeyboardInterrupt:
            self._terminal.take_interrupts()
            sys.stdout.write("\n")
            raise
        if not line.endswith(b"\n"):
            sys.stdout.write("\n")
        if not line:
            raise EOFError
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DymoeError(f"the line is not UTF-8 text ({error.reason} at byte {error.start})") from error
        if typed_ahead:  # nobody has seen it yet
            sys.stdout.write(f"{text}\n")
        return text


def _interrupt() -> None:
    raise KeyboardInterrupt

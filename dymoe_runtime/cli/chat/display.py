"""What a conversation shows: answers as they come, reasoning dimmed or hidden, notes."""

from __future__ import annotations

import re
from typing import TextIO

from dymoe_runtime.text.generate import Token

DIM, NORMAL, ERASE_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
THINKING, THOUGHT = "(thinking...)", "(end of thinking)"
# All control characters but the tab and the line feed.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape_controls(text: str) -> str:
    r"""Return `text` with its control characters spelled out, because a terminal would obey them.

    >>> escape_controls("a\x1b[2Jb\n")
    'a\\x1b[2Jb\n'
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class Display:
    """Writes to a terminal; with `plain` without escape codes, without `styles` without dimmed text."""

    def __init__(self, out: TextIO, plain: bool = False, styles: bool = True, show_reasoning: bool = True) -> None:
        self._out = out
        self._plain, self._styles, self._show_reasoning = plain, styles and not plain, show_reasoning
        self._open_line = False  # whether the cursor is behind some text
        self._thinking = False
        self._bare = True  # whether nothing of this part of the answer has been shown

    def show(self, token: Token) -> None:
        """Show what a token adds."""
        if token.reasoning:
            self._think(token.reasoning)
        if token.text:
            self._end_thinking()
            self._write_part(token.text)
        self._out.flush()

    def end_answer(self) -> None:
        """End the answer's last line."""
        self._end_thinking()
        self._end_line()
        self._bare = True
        self._out.flush()

    def note(self, text: str) -> None:
        """Show a note of one sentence."""
        self.print(f"({text})")

    def print(self, text: str) -> None:
        """Show lines of text."""
        self._end_line()
        self._out.write(f"{escape_controls(text)}\n")
        self._out.flush()

    def _think(self, text: str) -> None:
        if not self._thinking:
            self._thinking = True
            if not self._show_reasoning or not self._styles:
                self._write(THINKING)
                if self._show_reasoning or self._plain:
                    self._end_line()
            elif self._styles:
                self._out.write(DIM)
        if self._show_reasoning:
            self._write_part(text)

    def _end_thinking(self) -> None:
        if not self._thinking:
            return
        self._thinking, self._bare = False, True
        if self._show_reasoning:
            if self._styles:
                self._out.write(NORMAL)
            self._end_line()
            if not self._styles:
                self._out.write(f"{THOUGHT}\n")
        elif not self._plain:
            self._out.write(ERASE_LINE)
            self._open_line = False

    def _write_part(self, text: str) -> None:
        """Write text of the reasoning or of the answer, without blank lines at its beginning."""
        text = text.lstrip("\n") if self._bare else text
        if text:
            self._bare = False
            self._write(escape_controls(text))

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._open_line = not text.endswith("\n")

    def _end_line(self) -> None:
        if self._open_line:
            self._out.write("\n")
            self._open_line = False

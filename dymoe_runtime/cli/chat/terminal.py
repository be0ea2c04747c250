"""The terminal of a conversation: its modes while nothing is read from it, and what its signals do."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from typing import Any

# Values of TERM of terminals that know no escape codes.
PLAIN_TERMS = ("", "dumb", "unknown")
# The interrupt of one answer that ends the program, because the answer has not stopped.
LAST_INTERRUPT = 3
STOPPING = "\n(stopping; Ctrl-C once more ends the program)\n"
# Text as usual, lines that wrap, a cursor that shows, and pastes that are not marked.
AS_USUAL = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?2004l"
_IFLAG, _LFLAG, _CC = 0, 3, 6


def is_plain() -> bool:
    """Return whether the terminal knows no escape codes."""
    return os.environ.get("TERM", "") in PLAIN_TERMS


def _nothing() -> None:
    pass


class Terminal:
    """The terminal on stdin, as a context manager that gives it back as it was, however the program ends.

    Within the context, what is typed is not shown and waits for the next prompt. SIGINT is counted in `interrupts`
    instead of raising KeyboardInterrupt in the middle of something. Use it in the main thread only.
    """

    def __init__(self) -> None:
        self.plain = is_plain()
        self.interrupts = 0  # since the last prompt began
        self._fd = sys.stdin.fileno()
        self._original = termios.tcgetattr(self._fd)
        self._quiet = _quiet(self._original, self.plain)
        self._handlers: dict[signal.Signals, Any] = {}
        self._on_interrupt: Callable[[], None] | None = None
        self._redraw = _nothing

    def __enter__(self) -> Terminal:
        own: dict[signal.Signals, Callable[[int, Any], None]] = {
            signal.SIGINT: self._interrupted,
            signal.SIGTSTP: self._suspended,
            signal.SIGHUP: self._ended,
            signal.SIGQUIT: self._ended,
        }
        for number, handler in own.items():
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                self._handlers[number] = signal.signal(number, handler)
        self._set(self._quiet)
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(termios.error):  # what was typed for the model is no command of the shell
            termios.tcflush(self._fd, termios.TCIFLUSH)
        self._restore()
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def prompting(self, on_interrupt: Callable[[], None], redraw: Callable[[], None] = _nothing) -> Iterator[None]:
        """Call `on_interrupt` on SIGINT, and `redraw` after the program was stopped, within this context.

        Both run as signal handlers. `on_interrupt` may raise KeyboardInterrupt; otherwise it, or what it starts, calls
        `take_interrupts`. An interrupt that nobody took counts for the answer that follows.
        """
        self.interrupts, self._on_interrupt, self._redraw = 0, on_interrupt, redraw
        try:
            yield
        finally:
            self._on_interrupt, self._redraw = None, _nothing

    def interrupt(self) -> None:
        """Count an interrupt that came as a key."""
        self.interrupts += 1

    def take_interrupts(self) -> None:
        """Forget the interrupts so far, because somebody has seen them."""
        self.interrupts = 0

    @contextlib.contextmanager
    def echoing(self) -> Iterator[None]:
        """Show what is typed, and let the system edit the line, within this context."""
        self._set(self._original)
        try:
            yield
        finally:
            self._set(self._quiet)

    def _set(self, attributes: list[Any]) -> None:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def _restore(self) -> None:
        """Give the terminal back as it was; a prompt may just be running."""
        if not self.plain:
            with contextlib.suppress(OSError):
                os.write(sys.stdout.fileno(), AS_USUAL.encode())
        self._set(self._original)

    def _interrupted(self, number: int, frame: object) -> None:
        self.interrupts += 1
        if self._on_interrupt is not None:
            self._on_interrupt()
        elif self.interrupts >= LAST_INTERRUPT:
            raise KeyboardInterrupt
        elif self.interrupts > 1:
            with contextlib.suppress(OSError):  # stdout may be in the middle of a write
                os.write(sys.stdout.fileno(), STOPPING.encode())

    def _suspended(self, number: int, frame: object) -> None:
        """Stop, and go on with the modes of before."""
        try:
            modes = termios.tcgetattr(self._fd)
        except termios.error:
            modes = self._quiet
        self._restore()
        _raise_default(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._suspended)
        self._set(modes)
        self._redraw()

    def _ended(self, number: int, frame: object) -> None:
        self._restore()
        _raise_default(number)


def _raise_default(number: int) -> None:
    """Do what a signal does to a program that does not handle it."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(signal.Signals(number))


def _quiet(original: list[Any], plain: bool) -> list[Any]:
    """Return the modes in which nothing that is typed is shown, and Ctrl-C is a signal that discards nothing.

    On a plain terminal the system goes on to gather lines. Else all keys wait as they are for the next prompt.
    """
    quiet = [*original[:_CC], [*original[_CC]]]
    quiet[_LFLAG] = (quiet[_LFLAG] & ~termios.ECHO) | termios.ISIG | termios.NOFLSH
    if not plain:
        quiet[_LFLAG] &= ~termios.ICANON
        quiet[_IFLAG] &= ~termios.ICRNL
        quiet[_CC][termios.VMIN], quiet[_CC][termios.VTIME] = 1, 0
    return quiet

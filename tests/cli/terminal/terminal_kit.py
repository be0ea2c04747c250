"""A program on a pseudo-terminal, its keys and its screen."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyte

PATIENCE_S = 30.0
ENTER, ALT_ENTER, TAB, UP, LEFT = "\r", "\x1b\r", "\t", "\x1b[A", "\x1b[D"
CTRL_A, CTRL_C, CTRL_D, CTRL_R, CTRL_Z = "\x01", "\x03", "\x04", "\x12", "\x1a"
PASTE = "\x1b[200~{}\x1b[201~"
_LFLAG = 3


class TerminalProgram:
    """A program whose stdin, stdout and stderr are a terminal of its own; a context manager that ends it."""

    def __init__(self, command: Sequence[object], home: Path, columns: int = 120, rows: int = 40, **env: str) -> None:
        self.master, slave = pty.openpty()
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self.resize(columns, rows)
        self.modes = termios.tcgetattr(slave)
        self.output = ""  # all that was written
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stream = pyte.Stream(self.screen)
        self._slave = slave
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=_environment(home, env),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> TerminalProgram:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self._slave)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read(self, seconds: float = 0.0) -> bool:
        """Take what the program writes within some time; return whether it wrote."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        text = self._decoder.decode(os.read(self.master, 65536))
        self.output += text
        self._stream.feed(text)
        return True

    def read_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.read(left)

    def until(self, what: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + patience_s
        while not what():
            left = deadline - time.monotonic()
            ended, wrote = self.process.poll() is not None, False  # its last words may still be on their way
            with contextlib.suppress(OSError):  # the terminal has no program any more
                wrote = self.read(0.0 if ended else max(0.0, min(left, 0.1)))
            assert left > 0 and (wrote or not ended), f"{self.process.poll()}\n{self.text()}\n{self.output[-500:]!r}"

    def until_shown(self, words: str) -> None:
        self.until(lambda: words in self.text())

    @property
    def line(self) -> str:
        """The line of the cursor."""
        row = self.screen.buffer[self.screen.cursor.y]  # to render the whole display for each key takes long
        return "".join(row[x].data for x in range(self.screen.columns)).rstrip()

    def at_prompt(self) -> bool:
        return self.line == ">" and self.screen.cursor.x == 2

    def until_prompt(self) -> None:
        self.until(self.at_prompt)

    def enter(self, text: str) -> None:
        """Type a line at the prompt and send it; return once the program has taken it."""
        self.until_prompt()
        self.send(text)
        self.until(lambda: not self.at_prompt())
        self.until(lambda: self.line.endswith(text.rstrip()[-8:]))
        before = len(self.output)
        self.send(ENTER)
        self.until(lambda: "\n" in self.output[before:])

    def ask(self, text: str) -> str:
        """Send a line, and return what is shown up to the next prompt."""
        self.until_prompt()
        before = len(self.lines())
        self.enter(text)
        self.until_prompt()
        return "\n".join(self.lines()[before:-1])

    def lines(self) -> list[str]:
        """All lines of the screen and above it, up to that of the cursor."""
        above = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        return [line.rstrip() for line in (*above, *self.screen.display[: self.screen.cursor.y + 1])]

    def text(self) -> str:
        return "\n".join(self.lines())

    def ends(self, code: int) -> None:
        """The program ends with an exit code and leaves the terminal as it was."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text()
            self.read(0.05)
        while self.read():
            pass
        assert self.process.returncode == code, self.text()
        self.is_as_before()

    def is_as_before(self) -> None:
        assert termios.tcgetattr(self._slave) == self.modes
        assert self.output.count("\x1b[?2004h") <= self.output.count("\x1b[?2004l")
        assert "Traceback" not in self.output

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._slave)[_LFLAG] & termios.ECHO)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def chat_command(bundle: Path, *args: object) -> list[Any]:
    return [sys.executable, "-m", "dymoe_runtime", bundle, "--chat", *args]


def _environment(home: Path, changes: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NO_COLOR", "XDG_", "TMUX"))}
    return kept | {"HOME": str(home), "TERM": "xterm-256color"} | changes


# A conversation whose answers are what the test says: by default the message as Python writes it.
SCRIPTED = """
import time
from dymoe_runtime.text.generate import Token
from dymoe_runtime.text.session import Session
def tokens(text):
    yield Token(1, repr(text), "stop")
def reply(self, text, *rest, **options):
    yield from tokens(text)
{script}
Session.reply = reply
from dymoe_runtime.cli.__main__ import run
run()
"""
# Counts up to a hundred, a number each 20 ms, if the message is "count".
COUNTING = """
def tokens(text):
    for i in range(100 if text == "count" else 0):
        time.sleep(0.02)
        yield Token(1, f"{i} ", None)
    yield Token(1, repr(text), "stop")
"""


def scripted_command(bundle: Path, *args: object, script: str = "") -> list[Any]:
    return [sys.executable, "-c", SCRIPTED.replace("{script}", script), bundle, "--chat", *args]


# A model that takes its time in the layers of a prompt and in each token.
SLOW_MODEL = """
import time
from dymoe_runtime.engine import model
from dymoe_runtime.engine.arena_sizing import LimitedExperts
decode, prefill = model.Model.decode, LimitedExperts.prefill
def slow_decode(self, token_id):
    time.sleep({decode_s})
    return decode(self, token_id)
def slow_prefill(self, *args):
    y = prefill(self, *args)
    time.sleep({prefill_s})
    return y
model.Model.decode, LimitedExperts.prefill = slow_decode, slow_prefill
from dymoe_runtime.cli.__main__ import run
run()
"""


def slow_command(bundle: Path, *args: object, decode_s: float = 0.002, prefill_s: float = 0.01) -> list[object]:
    script = SLOW_MODEL.format(decode_s=decode_s, prefill_s=prefill_s)
    return [sys.executable, "-c", script, bundle, "--chat", "--temperature", 0, *args]


def messages(chat: TerminalProgram, file: Path) -> list[dict[str, str]]:
    chat.ask(f"/save --replace {file}")
    return list(json.loads(file.read_text())["messages"])

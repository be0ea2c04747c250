"""A conversation in tmux, as a person holds it: in a shell, with a real terminal's answers to all codes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli.terminal.terminal_kit import COUNTING, PATIENCE_S, scripted_command

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux")


class Tmux:
    """A window of tmux with a shell in it."""

    def __init__(self, socket: Path, home: Path) -> None:
        self._base = ["tmux", "-S", str(socket), "-f", os.devnull]
        self._env = {k: v for k, v in os.environ.items() if k not in ("TMUX", "NO_COLOR")}
        self._env |= {"HOME": str(home), "TERM": "xterm", "PS1": "$ ", "LC_ALL": "C.UTF-8"}
        self.run("new-session", "-d", "-x", "80", "-y", "24", "env", "PS1=$ ", "bash", "--norc")
        self.until(lambda: self.screen().startswith("$"))

    def run(self, *args: str) -> str:
        done = subprocess.run([*self._base, *args], env=self._env, capture_output=True, text=True, check=True)
        return done.stdout

    def keys(self, *keys: str) -> None:
        self.run("send-keys", *keys)

    def screen(self) -> str:
        return self.run("capture-pane", "-p", "-J").rstrip()

    def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline, self.screen()
            time.sleep(0.05)

    def until_shown(self, words: str) -> None:
        self.until(lambda: words in self.screen())

    def until_last(self, line: str) -> None:
        self.until(lambda: self.screen().splitlines()[-1:] == [line])


@pytest.fixture
def window(tmp_path: Path) -> Iterator[Tmux]:
    socket = Path("/tmp") / f"dymoe-test-{os.getpid()}"  # the path of a socket has at most 107 bytes
    tmux = Tmux(socket, tmp_path)
    try:
        yield tmux
    finally:
        subprocess.run(["tmux", "-S", str(socket), "kill-server"], capture_output=True)
        socket.unlink(missing_ok=True)


def test_a_conversation_in_a_window_of_tmux(window: Tmux, tiny_chat_path: Path) -> None:
    (tiny_chat_path.parent / "chat.sh").write_text(
        f"exec {shlex.join(map(str, scripted_command(tiny_chat_path, script=COUNTING)))}\n"
    )
    window.keys(f"sh {tiny_chat_path.parent / 'chat.sh'}", "Enter")
    window.until_last(">")
    window.keys("hello", "Left", "Left", "C-h", "BSpace", "u", "Enter")
    window.until_shown("'hulo'")
    window.keys("one", "M-Enter", "two", "Enter")
    window.until_shown("'one\\ntwo'")
    window.keys("/he", "Tab", "Enter")
    window.until_shown("Alt-Enter")
    window.keys("count", "Enter")
    window.until_shown(" 9 ")
    window.keys("ahead", "C-c")
    window.until_last("> ahead")
    assert "(stopped)" in window.screen() and " 99 " not in window.screen()
    window.run("resize-window", "-x", "20", "-y", "24")
    window.keys(" of a narrow window", "Enter")
    window.until_shown("'ahead of a narrow w")
    window.run("resize-window", "-x", "80", "-y", "24")
    window.until_last(">")
    window.keys("half", "C-z")
    window.until_shown("Stopped")
    window.keys("fg", "Enter")
    window.until_last("> half")
    window.keys("C-c", "C-d")
    window.until_last("$")
    window.keys("stty -a | grep -o -w -e '-\\?echo' -e '-\\?icanon'; echo done", "Enter")
    window.until_shown("\ndone")
    assert "\necho\n" in window.screen() and "-icanon" not in window.screen().replace("'-", "")

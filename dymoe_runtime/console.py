"""Helpers that all commands share: errors as one sentence, options that take several values, progress."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import click

from dymoe_runtime.errors import DymoeError, remedy_of
from dymoe_runtime.units import parse_size

INTERRUPTED, TERMINATED = 130, 143
OUT_OF_MEMORY = (
    "out of memory; give dymoe-run a smaller --memory or --context, dymoe-compile fewer --calibration-tokens or --jobs"
)
MAX_SEED = (1 << 63) - 1
# Time between the progress lines of a stage, where stderr is not a terminal.
LINE_INTERVAL_S = 30.0


# Characters that make a terminal do something, or show text in another order than it has; and lone surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return `text` with control characters escaped, but for line breaks and tabs.

    Text from files and arguments could otherwise do anything to a terminal.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """Return `text` as one line, with control characters escaped."""
    return " ".join(printable(text).split())


def say(text: str, err: bool = False) -> None:
    """Print `text` to stdout, or to stderr if `err` is true, with control characters escaped."""
    click.echo(printable(text), err=err)


@contextlib.contextmanager
def _escaping() -> Iterator[None]:
    """Escape control characters in messages about wrong usage within this context."""
    try:
        yield
    except click.ClickException as error:
        error.message = printable(error.message)  # type: ignore[misc]  # final since click 8.5
        raise


class Escaping(click.Command):
    """A command whose messages about wrong usage show arguments with control characters escaped."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _escaping():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _escaping():
            return super().invoke(ctx)


class Commands(Escaping, click.Group):
    """A group of commands."""


def start(command: click.Command, name: str) -> NoReturn:
    """Run a command, and exit; the exit code is 1 if stdout cannot take all that was printed."""
    code: Any = 0
    for fd in range(3):  # one that is closed would be the next file to be opened
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            code = 1 if fd == 1 else code
    if code:
        sys.exit(_lost(name, "it is closed"))
    try:
        try:
            command(prog_name=name)
        except SystemExit as exit_:
            code = exit_.code
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        code = code or 1
    except OSError as error:
        _drop_stdout()
        code = code or _lost(name, error.strerror or str(error))
    sys.exit(code)


def _lost(name: str, why: str) -> int:
    """Say that stdout did not take the output; return the exit code."""
    with contextlib.suppress(OSError):
        click.echo(f"{name}: stdout: the output could not be written ({why}); redirect it elsewhere", err=True)
    return 1


def _drop_stdout() -> None:
    """Let stdout lead nowhere, so that flushing it at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Remembering(io.FileIO):
    """A file that remembers why a write failed."""

    failed: OSError | None = None

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


@contextlib.contextmanager
def noticing_lost_output() -> Iterator[None]:
    """Raise OSError at the end of this context if stdout did not take all that was printed within it.

    It is for code that ignores such errors, as argparse does when it prints its help.
    """
    usual = sys.stdout
    try:
        file = _Remembering(usual.fileno(), "w", closefd=False)
    except io.UnsupportedOperation:  # it is in memory, which takes all
        yield
        return
    text = io.TextIOWrapper(io.BufferedWriter(file), usual.encoding, usual.errors, line_buffering=usual.isatty())
    sys.stdout = text
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            text.flush()
        sys.stdout = usual
        if file.failed is not None:
            raise OSError(file.failed.errno, file.failed.strerror, "stdout")


class ManyValues(Escaping):
    """A command whose `multiple` options also take several values after one flag: `--eval a b c`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [p for p in self.params if isinstance(p, click.Option) and not p.is_flag]
        many, one = ({flag for p in options if p.multiple is multiple for flag in p.opts} for multiple in (True, False))
        return super().parse_args(
            ctx, _spread(args, many, one, any(isinstance(p, click.Argument) for p in self.params))
        )


def _spread(args: list[str], many: set[str], one: set[str], needs_argument: bool) -> list[str]:
    """Repeat the flags in `many` before each of their values; those in `one` take a single value."""
    spread: list[str] = []
    flag, values, positional, last = "", 0, 0, 0
    left = iter(args)
    for arg in left:
        if arg in one:
            flag = ""
            spread += [arg, *itertools.islice(left, 1)]
        elif arg.startswith("-") and arg != "-":
            flag, values = arg if arg in many else "", 0
            spread.append(arg)
        elif flag:
            spread += [arg] if values == 0 else [flag, arg]
            values += 1
            last = len(spread) if values > 1 else last
        else:
            spread.append(arg)
            positional += 1
    # `--stop a BUNDLE --prompt x`: the last of several values is the missing argument.
    if needs_argument and positional == 0 and last:
        del spread[last - 2]
    return spread


class Size(click.ParamType):  # type: ignore[type-arg]
    """A click type for a number of bytes: 4GiB, 500MB, 123."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class FiniteRange(click.FloatRange):
    """A range of numbers, of which NaN and infinity are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number that is meant here", param, ctx)
        return number


class Duration(click.ParamType):  # type: ignore[type-arg]
    """A click type for a positive time, converted to seconds: 100ms, 0.1s."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s)", str(value).strip())
        if match is None or not 0 < float(match[1]) < math.inf:
            self.fail(f"'{value}' is not a time; write it like 100ms or 0.1s", param, ctx)
        return float(match[1]) / (1000 if match[2] == "ms" else 1)


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that it ends a command in the same orderly way as an interrupt."""


@contextlib.contextmanager
def _termination_raised() -> Iterator[None]:
    """Raise Terminated in the main thread on SIGTERM, within this context."""

    def terminate(signum: int, frame: object) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that an error which the user can fix becomes one sentence on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters of a model's text
        try:
            with _termination_raised():
                command(*args, **kwargs)
        except DymoeError as error:
            fail(str(error), error.exit_code)
        except Terminated:
            fail("terminated", TERMINATED)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except BrokenPipeError:  # the reader of stdout is gone
            _drop_stdout()
            sys.exit(1)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                fail(OUT_OF_MEMORY, 1)
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            remedy = remedy_of(error, "check the path and its permissions")
            fail(f"{where}{error.strerror or error}; {remedy}", 1)
        except MemoryError:
            fail(OUT_OF_MEMORY, 1)
        except RuntimeError as error:  # how torch reports it
            if "can't allocate memory" not in str(error):
                raise
            fail(OUT_OF_MEMORY, 1)

    return wrapped


def fail(message: str, code: int) -> NoReturn:
    """Print the command's name and `message` on one line of stderr, and exit with `code`."""
    name = click.get_current_context().find_root().info_name
    click.echo(f"{name}: {one_line(message)}", err=True)
    sys.exit(code)


def print_json(values: Any) -> None:
    """Print `values` as JSON on one line of stdout."""
    click.echo(json.dumps(values, allow_nan=False))


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[], object]]:
    """Show a bar with the time left on stderr; yield the function that counts one step.

    Nothing is shown if stderr is not a terminal.
    """
    from tqdm import tqdm  # imported here so that commands without a bar do not wait for it

    with tqdm(total=total, desc=title, leave=False, disable=None, file=sys.stderr) as bar:
        yield bar.update


@contextlib.contextmanager
def byte_progress(title: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """Show a bar of bytes on stderr, as `progress_bar` does; yield the function that counts some.

    `total` is None if it is not known.
    """
    from tqdm import tqdm

    scale = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with tqdm(total=total, desc=title, leave=False, disable=None, file=sys.stderr, **scale) as bar:
        yield bar.update


@contextlib.contextmanager
def stage_progress(title: str, total: int) -> Iterator[Callable[[], object]]:
    """Show the progress of a long stage on stderr; yield the function that counts one step.

    On a terminal it is a bar. Elsewhere it is one line every LINE_INTERVAL_S and one at the end of a successful stage.
    """
    if sys.stderr.isatty():
        with progress_bar(title, total) as advance:
            yield advance
        return
    with _StageLines(title, total) as stage:
        yield stage.advance


@contextlib.contextmanager
def json_progress(title: str, total: int) -> Iterator[Callable[[], object]]:
    """Write the progress of a long stage to stderr as JSON, one object a line; yield the function that counts one step.

    An object has `stage`, `done`, `total` and `elapsed_s`. There is one when the stage begins, one every
    LINE_INTERVAL_S, and one at the end of a successful stage.
    """
    with _JsonLines(title, total) as stage:
        yield stage.advance


class _StageLines:
    """The progress lines of one stage, written by a thread of their own."""

    def __init__(self, title: str, total: int, interval_s: float = LINE_INTERVAL_S) -> None:
        self._title, self._total, self._interval_s = title, total, interval_s
        self._done = 0
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> _StageLines:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._say_end()

    def advance(self) -> None:
        """Count one step."""
        self._done += 1

    def _report(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._say_step()

    def _say_step(self) -> None:
        self._say(f"{self._done} of {self._total} after {self._seconds():.0f} s")

    def _say_end(self) -> None:
        self._say(f"{self._total} done in {self._seconds():.1f} s")

    def _say(self, what: str) -> None:
        click.echo(f"{self._title}: {what}", err=True)

    def _seconds(self) -> float:
        return time.monotonic() - self._started


class _JsonLines(_StageLines):
    """The progress of one stage as JSON, one object a line."""

    def __enter__(self) -> _StageLines:
        self._say_step()
        return super().__enter__()

    def _say_step(self) -> None:
        elapsed = round(self._seconds(), 3)
        values = {"stage": self._title, "done": self._done, "total": self._total, "elapsed_s": elapsed}
        click.echo(json.dumps(values), err=True)

    def _say_end(self) -> None:
        self._done = self._total
        self._say_step()


def spare_imports() -> None:
    """Exclude all objects that exist now from garbage collection.

    After the imports there are so many that one collection takes as long as dozens of tokens, and Python would collect
    several times at exit.
    """
    gc.freeze()


@contextlib.contextmanager
def sparing_imports() -> Iterator[None]:
    """Disable the garbage collector during imports within this context, then exclude the imported objects from it.

    Otherwise the collector would scan them again and again while their number grows.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        spare_imports()
    finally:
        if enabled:
            gc.enable()

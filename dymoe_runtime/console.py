"""What the commands share: errors as one sentence, options that take several values, progress."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import click

from dymoe_runtime.device import parse_size
from dymoe_runtime.errors import DymoeError

INTERRUPTED, TERMINATED = 130, 143
OUT_OF_MEMORY = (
    "out of memory; give dymoe-run a smaller --memory or --context, dymoe-compile fewer --calibration-tokens or --jobs"
)
MOST_THREADS = 1024
MOST_SEED = (1 << 63) - 1


class ManyValues(click.Command):
    """A command whose `multiple` options also take several values after one flag: `--eval a b c`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        many = {flag for p in self.params if isinstance(p, click.Option) and p.multiple for flag in p.opts}
        return super().parse_args(ctx, _spread(args, many, any(isinstance(p, click.Argument) for p in self.params)))


def _spread(args: list[str], many: set[str], needs_argument: bool) -> list[str]:
    """Repeat the flags in `many` before each of their values."""
    spread: list[str] = []
    flag, values, positional = "", 0, 0
    for arg in args:
        if arg.startswith("-") and arg != "-":
            flag, values = arg if arg in many else "", 0
            spread.append(arg)
        elif flag:
            spread += [arg] if values == 0 else [flag, arg]
            values += 1
        else:
            spread.append(arg)
            positional += 1
    # `--calibration text.txt MODEL`: the last value was meant as the argument that is missing.
    if needs_argument and positional == 0 and values > 1:
        spread[-2:] = [spread[-1]]
    return spread


class Size(click.ParamType):
    """A number of bytes: 4GiB, 500MB, 123."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Duration(click.ParamType):
    """Seconds: 100ms, 0.1s."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s)", str(value).strip())
        if match is None or float(match[1]) <= 0:
            self.fail(f"'{value}' is not a time; write it like 100ms or 0.1s", param, ctx)
        return float(match[1]) / (1000 if match[2] == "ms" else 1)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as orderly as an interrupt does."""


@contextlib.contextmanager
def _termination_raised() -> Iterator[None]:
    """SIGTERM raises Terminated in the main thread."""

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
    """Turn what a user can mend into one sentence on stderr and its exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="replace")  # of a model's text, not every terminal has all
        try:
            with _termination_raised():
                command(*args, **kwargs)
        except DymoeError as error:
            fail(str(error), error.exit_code)
        except Terminated:
            fail("terminated", TERMINATED)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output has gone; keep Python from complaining at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                fail(OUT_OF_MEMORY, 1)
            where = f"{error.filename}: " if error.filename else ""
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space" if full else "check the path and its permissions"
            fail(f"{where}{error.strerror or error}; {remedy}", 1)
        except MemoryError:
            fail(OUT_OF_MEMORY, 1)
        except RuntimeError as error:  # torch's
            if "can't allocate memory" not in str(error):
                raise
            fail(OUT_OF_MEMORY, 1)

    return wrapped


def fail(message: str, code: int) -> NoReturn:
    name = click.get_current_context().find_root().info_name
    click.echo(f"{name}: {' '.join(message.split())}", err=True)
    sys.exit(code)


def print_json(values: Any) -> None:
    """One object on the last line of stdout."""
    click.echo(json.dumps(values, allow_nan=False))


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[], object]]:
    """A bar on stderr with the time left, where that is a terminal."""
    from tqdm import tqdm  # a run that shows none does not wait for it

    with tqdm(total=total, desc=title, leave=False, disable=None, file=sys.stderr) as bar:
        yield bar.update


def spare_imports() -> None:
    """Keep the garbage collector from what is imported: going through all of it takes as long as dozens of tokens.

    At the exit too, where Python would go through it again and again before it ends.
    """
    gc.freeze()


@contextlib.contextmanager
def sparing_imports() -> Iterator[None]:
    """The same of what is imported meanwhile, which the collector does not go through while it grows either."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        spare_imports()
    finally:
        if enabled:
            gc.enable()

"""A process that has loaded all modules, and runs each command in a fork of itself inside limits.

A line of JSON on stdin, {"command": NAME, "args": [...]}, is answered with one on stdout: how the command ended.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from typing import Any, NoReturn

# A command that takes so long hangs, whether it computes or waits.
CPU_S, WALL_S, INTERVAL_S = 20, 60, 0.002
# More address space than any sound command asks for: what asks for more is refused, and should say so.
ADDRESS_BYTES = 6 << 30
SIGNAL, HANG, CRASH = 1000, 2000, 70


def main() -> None:
    """Answer requests until stdin ends."""
    import torch

    torch.set_num_threads(1)
    from dymoe_compile.cli import main as compiler
    from dymoe_compile.compile import compile_bundle
    from dymoe_runtime.cli import answer, measure
    from dymoe_runtime.cli.bundle import bundle
    from dymoe_runtime.cli.run import run
    from dymoe_runtime.text import chat_template

    assert compile_bundle and answer and measure and chat_template  # loaded once, before any fork
    commands = {"dymoe-run": run, "dymoe-bundle": bundle, "dymoe-compile": compiler}
    gc.collect(), gc.freeze()  # so that collections of a fork do not copy all pages
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run_one(commands[request["command"]], request)), flush=True)


def run_one(command: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Run a command in a fork; return its exit code, its output, and its peak memory in bytes."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            child(command, request, out.fileno(), err.fileno())
        waits, code = 0, None
        while True:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                break
            if waits * INTERVAL_S > WALL_S:  # counted, so that time in which all is stopped does not count
                os.kill(pid, signal.SIGKILL)
                code = HANG
            time.sleep(INTERVAL_S)
            waits += 1
        if code is None:
            code = SIGNAL + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        out.seek(0), err.seek(0)
        texts = {"out": out.read(1 << 20).decode(errors="replace"), "err": err.read(1 << 20).decode(errors="replace")}
        return {"code": code, "peak": usage.ru_maxrss << 10, **texts}


def child(command: Any, request: dict[str, Any], out: int, err: int) -> NoReturn:
    """Run a command with these descriptors as its output, and end."""
    code = CRASH
    try:
        for fd, into in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(fd, into)
        limits = ((resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_AS, ADDRESS_BYTES), (resource.RLIMIT_CORE, 0))
        for kind, most in limits:
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        from dymoe_runtime.console import start

        sys.argv = [request["command"], *request["args"]]
        start(command, request["command"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()

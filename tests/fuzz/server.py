"""A process that has loaded all modules, and runs each command in a fork of itself inside limits.

A line of JSON on stdin, {"command": NAME, "args": [...]}, is answered with one on stdout: how the command ended. It may
say more: `faults` for the library of tests/faults/shim.cpp, `limits` as {"RLIMIT_...": most}, `cwd`, `env`, and
`kill_s`, the seconds after which the command is killed, and `stdout`, a file for its output.
"""

from __future__ import annotations

import ctypes
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
        started, waits, code = time.monotonic(), 0, None
        kill_s = request.get("kill_s")
        while True:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                break
            # Waits are counted, so that time in which all is stopped is no hang.
            if waits * INTERVAL_S > WALL_S or (kill_s and time.monotonic() - started > kill_s):
                os.kill(pid, signal.SIGKILL)
                code = None if kill_s else HANG
            time.sleep(INTERVAL_S)
            waits += 1
        if code is None:
            code = SIGNAL + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        out.seek(0), err.seek(0)
        texts = {"out": out.read(1 << 20).decode(errors="replace"), "err": err.read(1 << 20).decode(errors="replace")}
        seconds, calls = time.monotonic() - started, shim().faults_count() if "faults" in request else 0
        return {"code": code, "peak": usage.ru_maxrss << 10, "seconds": seconds, "calls": calls, **texts}


def shim() -> Any:
    """Return the library of tests/faults/shim.cpp, which has been preloaded."""
    library = ctypes.CDLL(None)
    library.faults_count.restype = ctypes.c_long
    return library


def child(command: Any, request: dict[str, Any], out: int, err: int) -> NoReturn:
    """Run a command with these descriptors as its output, and end."""
    code = CRASH
    try:
        for fd, into in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(fd, into)
        limits = {"RLIMIT_CPU": CPU_S, "RLIMIT_AS": ADDRESS_BYTES, "RLIMIT_CORE": 0, **request.get("limits", {})}
        os.chdir(request.get("cwd", "."))
        os.environ.update(request.get("env", {}))
        if "stdout" in request:
            os.dup2(os.open(request["stdout"], os.O_WRONLY), 1)
        for name, most in limits.items():
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        from dymoe_runtime.console import start

        sys.argv = [request["command"], *request["args"]]
        if request.get("without_renameat2"):
            shim().faults_without_renameat2()
        if "faults" in request:
            shim().faults_arm(os.fsencode(request["faults"]))
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

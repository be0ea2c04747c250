"""The HTTP server: a socket, uvicorn on it, and an end that lets answers finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Generator
from typing import Any

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import Server

from dymoe_runtime.errors import DymoeError, remedy_of
from dymoe_runtime.serving.http.answers.backend import Backend

# Connections at the same time; more are refused with 503.
MAX_CONNECTIONS = 512
# Seconds for which an idle connection stays open, and in which the head of a request must come.
KEEP_ALIVE_S, HEAD_S = 30, 30.0
# Seconds after which a connection ends whose reader takes nothing.
STALL_S = 60
# Seconds that connections have for their last bytes, once all answers have ended.
LAST_BYTES_S = 2
BACKLOG = 128
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address; nobody can connect before the server runs.

    Raises DymoeError if the address is taken, or is none of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_S * 1000)
            made.bind(address)
        except BaseException:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = remedy_of(error, "choose another --host or --port") if isinstance(error, OSError) else "give another"
        raise DymoeError(f"--host {host} --port {port}: {reason}; {remedy}") from error
    return made


def serve(app: ASGIApp, backend: Backend, listener: socket.socket, grace_s: float, ready: Callable[[], object]) -> None:
    """Serve an application on a backend until SIGTERM or SIGINT.

    Answers that run then have `grace_s` seconds; a second signal ends them at once. `ready` is called once clients can
    connect. Call it in the main thread.
    """
    _log_to_stderr()
    config = Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_BYTES_S,
        backlog=BACKLOG,
    )
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        asyncio.run(_serve(_Server(config), backend, listener, grace_s, ready))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve(
    server: _Server, backend: Backend, listener: socket.socket, grace_s: float, ready: Callable[[], object]
) -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    hurry = asyncio.Event()

    def stop() -> None:
        (hurry if asked.is_set() else asked).set()

    for number in SIGNALS:
        loop.add_signal_handler(number, stop)
    running = asyncio.ensure_future(server.serve([listener]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.005)
        if not running.done():
            ready()
        waiting = asyncio.ensure_future(asked.wait())
        await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        ending = asyncio.ensure_future(backend.end(grace_s))
        hurried = asyncio.ensure_future(hurry.wait())
        await asyncio.wait((ending, hurried), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not ending.done():
            ending.cancel()
            await asyncio.wait((ending,))
            await backend.end(0)
        else:
            ending.result()
        server.should_exit = True
        await running
    finally:
        backend.close()


class _Server(Server):
    """uvicorn's server, without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Protocol(H11Protocol):
    """HTTP/1.1 on one connection, which ends if the head of a request does not come in time."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Begin to wait for the head of a request where none has come, or stop waiting."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.timeout_keep_alive_handler)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _log_to_stderr() -> None:
    """Write faults of the server to stderr, with their tracebacks; malformed requests are no faults."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

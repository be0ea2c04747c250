"""Operations: a path, what it takes and gives as types, and the function that answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.exchange.bodies import Taken
from dymoe_runtime.serving.http.exchange.client import CLIENT, client_of
from dymoe_runtime.serving.http.exchange.errors import ApiError, ErrorForm, as_api_error, as_field_error
from dymoe_runtime.serving.http.exchange.forms import OPENAI
from dymoe_runtime.serving.http.exchange.responses import JSON, json_response

log = logging.getLogger(__name__)

# Time for a body beside that of its bytes, and the fewest bytes a second: who sends slower holds a connection for long.
BODY_TIMEOUT_S = 30.0
SLOWEST_BYTES = 4096


@dataclass(frozen=True)
class Call:
    """One request: its body, if the operation has one, and the rest of it."""

    body: Any
    http: Request


@dataclass(frozen=True)
class Operation:
    """What a path does. The types are msgspec's; the OpenAPI document is made of them."""

    method: str
    path: str
    summary: str
    handle: Callable[[Backend, Call], Awaitable[ASGIApp]]
    body: type[msgspec.Struct] | None = None
    answer: Any = None  # type of the JSON that it answers; None for another kind of text
    events: Any = None  # type of each event, where it can stream
    media_type: str = JSON  # of the answer
    stream_type: str = ""
    form: ErrorForm = OPENAI
    errors: tuple[int, ...] = ()  # beside those that every operation has


class Endpoint:
    """An operation as an ASGI application. Its work is cancelled when the client goes away."""

    def __init__(self, operation: Operation, backend: Backend) -> None:
        self._operation, self._backend = operation, backend
        self._decoder = None if operation.body is None else msgspec.json.Decoder(operation.body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, in the form of the operation also where it fails."""
        operation, status = self._operation, 499  # what logs of servers call a client that went away

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        room = self._backend.bodies
        taken = room.begin()
        try:
            try:
                body = await read_body(receive, scope, taken) if operation.body else b""
            except ClientGone:
                return
            except ApiError as error:
                await self._refuse(error, scope, receive, counted)
                return
            CLIENT.set(client_of(scope))
            work = asyncio.ensure_future(self._work(body, scope, receive, counted))
            gone = asyncio.ensure_future(disconnected(receive))
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (work, gone):
                    if not task.done():
                        task.cancel()
                await asyncio.wait((work, gone))
            if not work.cancelled():
                work.result()
        finally:
            room.end(taken)
            self._backend.metrics.count_request(operation.path, status)

    async def _work(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            response = await self._operation.handle(self._backend, Call(self._decoded(body), Request(scope)))
            await response(scope, receive, noted)
        except Exception as error:
            if started:
                raise
            known = as_api_error(error)
            if known.status == 500 and not isinstance(error, ApiError):
                log.exception("%s failed", self._operation.path)
            await self._refuse(known, scope, receive, send)

    def _decoded(self, body: bytes) -> Any:
        if self._decoder is None:
            return None
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise as_field_error(error) from error

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        response = json_response(self._operation.form.body(error), error.status, error.headers)
        await response(scope, receive, send)


class ClientGone(Exception):
    """The client went away before its request was complete."""


async def read_body(receive: Receive, scope: Scope, taken: Taken) -> bytes:
    """Return the body of a request; raise ApiError if it is too long, there is no room, or it does not come."""
    length = dict(scope["headers"]).get(b"content-length", b"")
    if length.isdigit():
        taken.check(int(length[:20]))
    parts, begun = list[bytes](), time.monotonic()
    while True:
        left = begun + BODY_TIMEOUT_S + taken.nbytes / SLOWEST_BYTES - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, left))
        except asyncio.TimeoutError as error:
            raise ApiError(408, "the body did not come; send it again", headers={"Connection": "close"}) from error
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        taken.add(len(parts[-1]))
        if not message.get("more_body", False):
            return b"".join(parts)


async def disconnected(receive: Receive) -> None:
    """Return once the client has gone away, or has its response."""
    while (await receive())["type"] != "http.disconnect":
        pass

"""Responses: JSON, and streams of events that end when their reader goes away."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dymoe_runtime.serving.http.exchange.errors import ApiError, ErrorForm, as_api_error
from dymoe_runtime.serving.http.exchange.forms import form_of

JSON = "application/json"
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with a value as JSON."""
    return Response(msgspec.json.encode(value), status, dict(headers or {}), JSON)


def error_response(error: ApiError, path: str) -> Response:
    """Return an error in the form of the protocol that `path` belongs to."""
    return json_response(form_of(path).body(error), error.status, error.headers)


def event(data: Any, name: str | None = None) -> bytes:
    """Return a server-sent event with a value as JSON."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


def line(data: Any) -> bytes:
    """Return a value as a line of JSON."""
    return msgspec.json.encode(data) + b"\n"


class Stream:
    """A response that is sent while its parts are computed.

    The head is sent with the first part, so that an error before it is a response of its own. A later error ends the
    stream in the form of its protocol.
    """

    def __init__(self, parts: AsyncGenerator[bytes, None], form: ErrorForm, media_type: str = EVENTS) -> None:
        self._parts, self._form, self._media_type = parts, form, media_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the parts; sending waits while the reader is slow."""
        parts = self._parts
        try:
            first = await anext(parts)
            await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
            await _send_part(send, first)
            try:
                async for part in parts:
                    await _send_part(send, part)
            except Exception as error:
                known = as_api_error(error)
                await _send_part(send, self._form.event(known))
                if known.status == 500 and not isinstance(error, ApiError):
                    raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await parts.aclose()

    def _headers(self) -> list[tuple[bytes, bytes]]:
        kind = self._media_type + ("; charset=utf-8" if self._media_type == EVENTS else "")
        # The last one keeps nginx from collecting the parts.
        return [(b"content-type", kind.encode()), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})

"""Errors as HTTP responses, each in the form of the protocol that was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.serving.service.errors import Closing, Full, TooLong

# Seconds after which to ask a server again that ends; another one may then run.
RETRY_CLOSING_S = 5
# Most characters that an error has of what msgspec says, which quotes the request.
MOST_SAID = 200


class ApiError(Exception):
    """A refusal with its HTTP status; `field` names the part of the request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code
        self.headers = dict(headers or {})


class ErrorForm(Protocol):
    """How a protocol writes an error, by itself and within a stream."""

    @property
    def answer(self) -> Any:
        """Return the type of the JSON object of a response."""

    def body(self, error: ApiError) -> Any:
        """Return the JSON object of a response."""

    def event(self, error: ApiError) -> bytes:
        """Return what a stream sends that ends with an error."""


def as_api_error(error: Exception) -> ApiError:
    """Return the refusal that an error of the service, or of a handler, means to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Full):
        retry = str(math.ceil(error.retry_after_s))
        return ApiError(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": retry})
    if isinstance(error, Closing):
        return ApiError(503, str(error), code="closing", headers={"Retry-After": str(RETRY_CLOSING_S)})
    if isinstance(error, TooLong):  # agents shorten a conversation at this code
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, DymoeError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed; its log has the reason", code="internal_error")


def bad_field(field: str, message: str) -> ApiError:
    """Return the refusal of a request whose field is wrong."""
    return ApiError(400, f"{field}: {message}", field)


def shortened(text: str, most: int) -> str:
    """Return a text without its middle, where it has more than so many characters."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def as_field_error(error: Exception) -> ApiError:
    """Return the refusal of a body that msgspec could not read, naming the field."""
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply; send fewer levels")
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        reason = text.removeprefix("JSON is malformed: ") or "it cannot be read"
        return ApiError(400, f"the body is not JSON ({reason}); send a JSON object in UTF-8")
    message, _, place = text.partition(" - at `")
    field = place.rstrip("`").removeprefix("$").lstrip(".")
    message = message.replace("`", "")
    if message.startswith("Object missing required field "):
        missing = message.removeprefix("Object missing required field ").strip("'")
        field = f"{field}.{missing}" if field else missing
        return ApiError(400, f"{field}: this field is required", field)
    message = shortened(message[0].lower() + message[1:], MOST_SAID)
    return ApiError(400, f"{field}: {message}" if field else f"the body: {message}", field or None)

"""Who asks: the clients between which the queue is fair."""

from __future__ import annotations

import hashlib
from contextvars import ContextVar

from starlette.types import Scope

# The client of the request that the current task answers.
CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")


def client_of(scope: Scope) -> str:
    """Return a name for the client of a request: that of its key or, without one, its address."""
    headers = dict(scope["headers"])
    key = headers.get(b"authorization") or headers.get(b"x-api-key")
    if key:
        return hashlib.sha256(key).hexdigest()
    return str((scope.get("client") or ("",))[0])

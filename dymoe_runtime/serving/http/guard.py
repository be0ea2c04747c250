"""Who may ask: names in the Host header, origins of web pages, API keys."""

from __future__ import annotations

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dymoe_runtime.serving.http.answers.settings import Settings
from dymoe_runtime.serving.http.exchange.errors import ApiError
from dymoe_runtime.serving.http.exchange.responses import error_response
from dymoe_runtime.serving.http.page import is_of_page

# Names of this machine beside its loopback addresses.
LOCAL_NAMES = frozenset(("localhost", "localhost.localdomain", "ip6-localhost"))
# What everybody may see beside the page: whether the server runs.
OPEN_PATHS = frozenset(("/health",))


class HostCheck:
    """Refuses requests for other names, where only this machine can connect.

    A web page of an attacker could otherwise reach the server by a name that it makes point here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, local: bool) -> None:
        """Check nothing unless the server is `local`."""
        self._app, self._local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http" and self._local:
            host = Headers(scope=scope).get("host", "")
            if not is_local(host):
                error = ApiError(
                    403, "the Host header names another machine; ask by localhost or 127.0.0.1", code="wrong_host"
                )
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Guard:
    """Refuses web pages of other origins, and requests without a key."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._origins = app, settings.origins
        self._keys = tuple(key.encode() for key in settings.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http":
            error = self._refusal(Headers(scope=scope), scope["path"])
            if error is not None:
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        origin = headers.get("origin")
        if origin is not None and not self._may_ask(origin, headers.get("host", "")):
            return ApiError(
                403, "pages of this origin may not use the server; start it with --cors ORIGIN", code="wrong_origin"
            )
        is_open = path in OPEN_PATHS or is_of_page(path)
        if self._keys and not is_open and not self._has_key(headers):
            return ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY, or as x-api-key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _may_ask(self, origin: str, host: str) -> bool:
        own = origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
        return own or "*" in self._origins or origin in self._origins

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else []
        given.append(headers.get("x-api-key", ""))
        # All pairs are compared, so that the time says nothing about the keys.
        found = [hmac.compare_digest(one.encode("utf-8", "replace"), key) for one in given for key in self._keys]
        return any(found)


def is_local(host: str) -> bool:
    """Return whether a Host header, with or without a port, names this machine by a loopback address or name."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    return name.lower().rstrip(".") in LOCAL_NAMES or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Return whether a text is a loopback address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False

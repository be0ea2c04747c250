"""The chat page at /: its files, and the headers that keep everything else out of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parents[1] / "page"
# Where the files of the page are, but for the page itself, which is at /.
PREFIX = "/page/"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts and styles come from files of this server only, and the page talks to nobody else. Only the sanitizer may make
# elements of text ("trusted types").
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "dompurify",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # ask each time; most answers are 304
}


def page_routes() -> list[Route]:
    """Return the routes of all files of the page."""
    files = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in TYPES]
    routes = [_route(PREFIX + path.relative_to(FOLDER).as_posix(), path) for path in files]
    return [_route("/", FOLDER / "index.html"), *routes]


def is_of_page(path: str) -> bool:
    """Return whether a path belongs to the page, which has nothing secret: the requests that it makes need the key."""
    return path == "/" or path.startswith(PREFIX)


def _route(url: str, path: Path) -> Route:
    async def send(request: Request) -> Response:
        content = path.read_bytes()
        tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers | {"Content-Type": TYPES[path.suffix]})

    return Route(url, send)

"""The ASGI application: routes to all operations, behind the checks of who may ask."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.endpoint import Call, Endpoint, Operation
from dymoe_runtime.serving.http.exchange.errors import ApiError
from dymoe_runtime.serving.http.exchange.responses import error_response, json_response
from dymoe_runtime.serving.http.guard import Guard, HostCheck
from dymoe_runtime.serving.http.openapi import document
from dymoe_runtime.serving.http.page import page_routes

# Headers of answers that web pages may read beside the usual ones.
EXPOSED = ("retry-after",)


def make_app(backend: Backend, operations: Sequence[Operation]) -> Starlette:
    """Return the application of a server with these operations, the document that describes them, and the page."""
    settings = backend.settings
    described = document(operations, backend.about.version, bool(settings.keys))

    async def openapi(backend: Backend, call: Call) -> ASGIApp:
        return json_response(described)

    operations = (*operations, Operation("GET", "/openapi.json", "Return this document.", openapi))
    cors = (
        Middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=EXPOSED,
        ),
    )
    return Starlette(
        routes=[*page_routes(), *_routes(operations, backend)],
        middleware=[
            Middleware(HostCheck, local=settings.local),
            *(cors if settings.origins else ()),
            Middleware(Guard, settings=settings),
        ],
        exception_handlers={404: _not_found, 405: _wrong_method},
    )


def _routes(operations: Sequence[Operation], backend: Backend) -> list[Route]:
    return [Route(operation.path, Endpoint(operation, backend), methods=[operation.method]) for operation in operations]


async def _not_found(request: Request, error: Exception) -> Response:
    path = request.url.path
    return error_response(ApiError(404, f"there is nothing at {path[:80]}; see /openapi.json"), path)


async def _wrong_method(request: Request, error: Exception) -> Response:
    headers = getattr(error, "headers", None) or {}
    message = f"{request.method} is not what this path takes; use {headers.get('Allow', 'another method')}"
    return error_response(ApiError(405, message, headers=headers), request.url.path)

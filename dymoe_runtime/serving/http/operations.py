"""What tells about the server itself: /health, /metrics and /props."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.answers.metrics import CONTENT_TYPE
from dymoe_runtime.serving.http.endpoint import Call
from dymoe_runtime.serving.http.exchange.errors import ApiError
from dymoe_runtime.serving.http.exchange.responses import json_response


class Health(msgspec.Struct):
    """Whether the server takes requests."""

    status: str = "ok"


class Props(msgspec.Struct):
    """What the server runs, and how."""

    model_alias: str
    model_digest: str
    version: str
    total_slots: int
    default_generation_settings: dict[str, Any]
    chat_template_variables: list[str]
    has_chat_template: bool
    precision: str
    model: dict[str, Any]
    state: dict[str, Any]
    statistics: dict[str, Any]


async def health(backend: Backend, call: Call) -> ASGIApp:
    """Say that the server takes requests; raise ApiError when it ends."""
    if backend.closing:
        raise ApiError(503, "the server is ending", code="closing")
    return json_response(Health())


async def metrics(backend: Backend, call: Call) -> ASGIApp:
    """Return the metrics in Prometheus' text format."""
    return Response(backend.metrics.text(), media_type=CONTENT_TYPE)


async def props(backend: Backend, call: Call) -> ASGIApp:
    """Return what the server runs, and its statistics."""
    service, about = backend.service, backend.about
    state = service.state()
    settings = {"n_ctx": service.max_context, "params": backend.settings.params.to_json()}
    return json_response(
        Props(
            service.name,
            service.digest,
            about.version,
            state.slots,
            settings,
            sorted(backend.variables),
            service.tokenizer.has_chat_template,
            about.precision,
            dict(about.facts),
            asdict(state),
            service.statistics(),
        )
    )

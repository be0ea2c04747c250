"""GET /api/tags, /api/ps and /api/version, and POST /api/show."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.types import ASGIApp

from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.answers.structure import has_tools
from dymoe_runtime.serving.http.endpoint import Call
from dymoe_runtime.serving.http.exchange.errors import ApiError, bad_field
from dymoe_runtime.serving.http.exchange.responses import json_response
from dymoe_runtime.serving.http.models import iso_time
from dymoe_runtime.serving.http.ollama.requests import ShowRequest
from dymoe_runtime.text.reasoning import SWITCHES

# What follows a model's name where nothing else does.
LATEST = ":latest"
# When a model leaves memory that never does.
NEVER = "2318-04-10T00:00:00Z"


class Details(msgspec.Struct):
    """What kind of model it is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Tag(msgspec.Struct):
    """A model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(msgspec.Struct):
    """All models of the server."""

    models: list[Tag]


class Loaded(Tag, kw_only=True):
    """A model in memory."""

    expires_at: str
    size_vram: int = 0
    context_length: int


class AllLoaded(msgspec.Struct):
    """All models in memory."""

    models: list[Loaded]


class Version(msgspec.Struct):
    """The version of the server."""

    version: str


class Shown(msgspec.Struct):
    """What is known of a model."""

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


async def tags(backend: Backend, call: Call) -> ASGIApp:
    """List the one model."""
    return json_response(Tags([Tag(*_tag(backend))]))


async def ps(backend: Backend, call: Call) -> ASGIApp:
    """List the one model, which is in memory."""
    loaded = Loaded(*_tag(backend), expires_at=NEVER, context_length=backend.service.max_context)
    return json_response(AllLoaded([loaded]))


async def version(backend: Backend, call: Call) -> ASGIApp:
    """Return the version of the server."""
    return json_response(Version(backend.about.version))


async def show(backend: Backend, call: Call) -> ASGIApp:
    """Describe the model."""
    body: ShowRequest = call.body
    name = body.model or body.name
    if not name:
        raise bad_field("model", "this field is required")
    check_name(backend, name)
    about, context = backend.about, backend.service.max_context
    facts = {f"{about.family}.{key}": value for key, value in about.facts.items() if key != "model_type"}
    info = {
        "general.architecture": about.family,
        "general.parameter_count": about.parameters,
        f"{about.family}.context_length": context,
        **facts,
    }
    params = backend.settings.params.to_json()
    capabilities = ["completion"]
    capabilities += ["tools"] if has_tools(backend) else []
    capabilities += ["thinking"] if backend.variables & set(SWITCHES) else []
    parameters = "\n".join(f"{name} {value}" for name, value in params.items() if isinstance(value, int | float))
    modified = iso_time(about.created)
    return json_response(Shown("", parameters, "", _details(backend), info, capabilities, modified))


def check_name(backend: Backend, name: str) -> None:
    """Raise ApiError unless a name is that of the model, as Ollama does."""
    if name.removesuffix(LATEST) != backend.service.name:
        raise ApiError(404, f"model '{name[:80]}' not found; this server has {backend.service.name}")


def _tag(backend: Backend) -> tuple[str, str, str, int, str, Details]:
    name, about = backend.service.name + LATEST, backend.about
    return name, name, iso_time(about.created), about.size_bytes, backend.service.digest, _details(backend)


def _details(backend: Backend) -> Details:
    about = backend.about
    size = f"{about.parameters / 1e9:.1f}B" if about.parameters >= 1e9 else f"{about.parameters / 1e6:.1f}M"
    return Details("", "dymoe", about.family, [about.family], size, about.precision)

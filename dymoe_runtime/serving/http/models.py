"""Which models there are: GET /v1/models, in the form of OpenAI or of Anthropic."""

from __future__ import annotations

from datetime import datetime, timezone

import msgspec
from starlette.types import ASGIApp

from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.endpoint import Call
from dymoe_runtime.serving.http.exchange.errors import ApiError
from dymoe_runtime.serving.http.exchange.responses import json_response
from dymoe_runtime.serving.http.openai.fields import ModelBody, ModelList

# The header by which Anthropic's clients are known.
ANTHROPIC_VERSION = "anthropic-version"


class AnthropicModel(msgspec.Struct):
    """A model, as Anthropic's API writes it."""

    id: str
    display_name: str
    created_at: str
    type: str = "model"


class AnthropicModelList(msgspec.Struct):
    """All models of the server, as Anthropic's API writes them."""

    data: list[AnthropicModel]
    first_id: str
    last_id: str
    has_more: bool = False


async def list_models(backend: Backend, call: Call) -> ASGIApp:
    """List the one model."""
    name = backend.service.name
    if ANTHROPIC_VERSION in call.http.headers:
        return json_response(AnthropicModelList([_anthropic(backend)], name, name))
    return json_response(ModelList([_openai(backend)]))


async def one_model(backend: Backend, call: Call) -> ASGIApp:
    """Describe a model by its name; raise ApiError if there is none of it."""
    name = call.http.path_params["model"]
    if name != backend.service.name:
        raise ApiError(
            404, f"there is no model '{name[:80]}'; this server has {backend.service.name}", "model", "model_not_found"
        )
    anthropic = ANTHROPIC_VERSION in call.http.headers
    return json_response(_anthropic(backend) if anthropic else _openai(backend))


def iso_time(seconds: float) -> str:
    """Return a time, in seconds since 1970, as ISO 8601 writes it."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _openai(backend: Backend) -> ModelBody:
    about = backend.about
    meta = {"n_ctx": backend.service.max_context, "size": about.size_bytes, "n_vocab": backend.tokenizer.vocab_size}
    return ModelBody(backend.service.name, int(about.created), meta=meta)


def _anthropic(backend: Backend) -> AnthropicModel:
    name = backend.service.name
    return AnthropicModel(name, name, iso_time(backend.about.created))

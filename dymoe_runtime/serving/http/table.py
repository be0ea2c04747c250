"""All operations of the server."""

from __future__ import annotations

from dymoe_runtime.serving.http.endpoint import Operation
from dymoe_runtime.serving.http.exchange.responses import EVENTS
from dymoe_runtime.serving.http.models import list_models, one_model
from dymoe_runtime.serving.http.openai.chat import ChatChunk, ChatCompletion, ChatRequest, chat_completions
from dymoe_runtime.serving.http.openai.completions import Completion, CompletionRequest, completions
from dymoe_runtime.serving.http.openai.fields import ModelBody, ModelList
from dymoe_runtime.serving.http.operations import Health, Props, health, metrics, props

BUSY = (429, 503)

OPERATIONS = (
    Operation(
        "POST",
        "/v1/chat/completions",
        "Answer a conversation.",
        chat_completions,
        body=ChatRequest,
        answer=ChatCompletion,
        events=ChatChunk,
        stream_type=EVENTS,
        errors=BUSY,
    ),
    Operation(
        "POST",
        "/v1/completions",
        "Continue texts.",
        completions,
        body=CompletionRequest,
        answer=Completion,
        events=Completion,
        stream_type=EVENTS,
        errors=BUSY,
    ),
    Operation("GET", "/v1/models", "List the model.", list_models, answer=ModelList),
    Operation("GET", "/v1/models/{model:path}", "Describe a model.", one_model, answer=ModelBody, errors=(404,)),
    Operation("GET", "/health", "Say whether the server takes requests.", health, answer=Health, errors=(503,)),
    Operation("GET", "/metrics", "Return metrics for Prometheus.", metrics, media_type="text/plain"),
    Operation("GET", "/props", "Return what the server runs, and its statistics.", props, answer=Props),
)

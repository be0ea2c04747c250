"""All operations of the server."""

from __future__ import annotations

from dymoe_runtime.serving.http.anthropic.messages import AnthropicMessage, TokenCount, count_tokens, messages
from dymoe_runtime.serving.http.anthropic.requests import CountRequest, MessagesRequest
from dymoe_runtime.serving.http.endpoint import Operation
from dymoe_runtime.serving.http.exchange.forms import ANTHROPIC, OLLAMA
from dymoe_runtime.serving.http.exchange.responses import EVENTS, LINES
from dymoe_runtime.serving.http.models import list_models, one_model
from dymoe_runtime.serving.http.ollama.answers import Part, chat, generate
from dymoe_runtime.serving.http.ollama.models import AllLoaded, Shown, Tags, Version, ps, show, tags, version
from dymoe_runtime.serving.http.ollama.requests import GenerateRequest, OllamaChat, ShowRequest
from dymoe_runtime.serving.http.openai.chat import ChatChunk, ChatCompletion, ChatRequest, chat_completions
from dymoe_runtime.serving.http.openai.completions import Completion, CompletionRequest, completions
from dymoe_runtime.serving.http.openai.fields import ModelBody, ModelList
from dymoe_runtime.serving.http.openai.responses.create import create_response
from dymoe_runtime.serving.http.openai.responses.items import ResponseBody, ResponseEvent
from dymoe_runtime.serving.http.openai.responses.requests import ResponseRequest
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
    Operation(
        "POST",
        "/v1/responses",
        "Answer a text or a conversation with items.",
        create_response,
        body=ResponseRequest,
        answer=ResponseBody,
        events=ResponseEvent,
        stream_type=EVENTS,
        errors=BUSY,
    ),
    Operation(
        "POST",
        "/v1/messages",
        "Answer a conversation, in Anthropic's form.",
        messages,
        body=MessagesRequest,
        answer=AnthropicMessage,
        stream_type=EVENTS,
        form=ANTHROPIC,
        errors=BUSY,
    ),
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        "Count the tokens of a conversation.",
        count_tokens,
        body=CountRequest,
        answer=TokenCount,
        form=ANTHROPIC,
    ),
    Operation(
        "POST",
        "/api/chat",
        "Answer a conversation, in Ollama's form.",
        chat,
        body=OllamaChat,
        answer=Part,
        events=Part,
        stream_type=LINES,
        form=OLLAMA,
        errors=(404, *BUSY),
    ),
    Operation(
        "POST",
        "/api/generate",
        "Answer or continue a text.",
        generate,
        body=GenerateRequest,
        answer=Part,
        events=Part,
        stream_type=LINES,
        form=OLLAMA,
        errors=(404, *BUSY),
    ),
    Operation(
        "POST", "/api/show", "Describe the model.", show, body=ShowRequest, answer=Shown, form=OLLAMA, errors=(404,)
    ),
    Operation("GET", "/api/tags", "List the model.", tags, answer=Tags, form=OLLAMA),
    Operation("GET", "/api/ps", "List the model, which is in memory.", ps, answer=AllLoaded, form=OLLAMA),
    Operation("GET", "/api/version", "Return the version of the server.", version, answer=Version, form=OLLAMA),
    Operation("GET", "/v1/models", "List the model.", list_models, answer=ModelList),
    Operation("GET", "/v1/models/{model:path}", "Describe a model.", one_model, answer=ModelBody, errors=(404,)),
    Operation("GET", "/health", "Say whether the server takes requests.", health, answer=Health, errors=(503,)),
    Operation("GET", "/metrics", "Return metrics for Prometheus.", metrics, media_type="text/plain"),
    Operation("GET", "/props", "Return what the server runs, and its statistics.", props, answer=Props),
)

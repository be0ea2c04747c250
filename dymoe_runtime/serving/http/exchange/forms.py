"""The forms in which the protocols write errors."""

from __future__ import annotations

from typing import Any

import msgspec

from dymoe_runtime.serving.http.exchange.errors import ApiError, ErrorForm

OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class OpenAiError(msgspec.Struct):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAiErrorBody(msgspec.Struct):
    """An error as OpenAI's API writes it."""

    error: OpenAiError


class AnthropicError(msgspec.Struct):
    """What is wrong."""

    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct):
    """An error as Anthropic's API writes it."""

    error: AnthropicError
    type: str = "error"


class OllamaErrorBody(msgspec.Struct):
    """An error as Ollama writes it."""

    error: str


class OpenAiForm:
    """Errors of OpenAI's API."""

    answer: Any = OpenAiErrorBody

    def body(self, error: ApiError) -> Any:
        kind = OPENAI_TYPES.get(error.status, "invalid_request_error")
        return OpenAiErrorBody(OpenAiError(error.message, kind, error.field, error.code))

    def event(self, error: ApiError) -> bytes:
        return b"data: " + msgspec.json.encode(self.body(error)) + b"\n\n"


class ResponsesForm(OpenAiForm):
    """Errors of OpenAI's responses, whose streams name each event."""

    def event(self, error: ApiError) -> bytes:
        values = {"type": "error", "code": error.code, "message": error.message, "param": error.field}
        return b"event: error\ndata: " + msgspec.json.encode(values) + b"\n\n"


class AnthropicForm:
    """Errors of Anthropic's API."""

    answer: Any = AnthropicErrorBody

    def body(self, error: ApiError) -> Any:
        kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
        return AnthropicErrorBody(AnthropicError(kind, error.message))

    def event(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + msgspec.json.encode(self.body(error)) + b"\n\n"


class OllamaForm:
    """Errors of Ollama."""

    answer: Any = OllamaErrorBody

    def body(self, error: ApiError) -> Any:
        return OllamaErrorBody(error.message)

    def event(self, error: ApiError) -> bytes:
        return msgspec.json.encode(self.body(error)) + b"\n"


OPENAI, RESPONSES, ANTHROPIC, OLLAMA = OpenAiForm(), ResponsesForm(), AnthropicForm(), OllamaForm()


def form_of(path: str) -> ErrorForm:
    """Return the form of the protocol that a path belongs to; OpenAI's where it belongs to none."""
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    return OLLAMA if path.startswith("/api/") else OPENAI

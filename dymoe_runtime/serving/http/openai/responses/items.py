"""What a response consists of."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from dymoe_runtime.serving.http.openai.fields import AnswerDetails, TokensDetails
from dymoe_runtime.serving.http.openai.shared import ChosenToken


class OutputPart(msgspec.Struct, omit_defaults=True):
    """A part of an item: text of the answer, or of the reasoning."""

    type: str
    text: str
    annotations: list[Any] | UnsetType = UNSET
    logprobs: list[ChosenToken] | UnsetType = UNSET


class OutputItem(msgspec.Struct, omit_defaults=True):
    """An item: reasoning, a message, or a call of a function."""

    id: str
    type: str
    status: str
    role: str | UnsetType = UNSET
    content: list[OutputPart] | UnsetType = UNSET
    summary: list[Any] | UnsetType = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ResponseUsage(msgspec.Struct):
    """Tokens of a request and its answer."""

    input_tokens: int
    input_tokens_details: TokensDetails
    output_tokens: int
    output_tokens_details: AnswerDetails
    total_tokens: int


class ResponseError(msgspec.Struct):
    """Why a response failed."""

    code: str
    message: str


class Incomplete(msgspec.Struct):
    """Why a response is not complete."""

    reason: str


class ResponseBody(msgspec.Struct):
    """A response."""

    id: str
    created_at: int
    model: str
    status: str
    output: list[OutputItem]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_p: float
    top_logprobs: int
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    previous_response_id: str | None = None
    usage: ResponseUsage | None = None
    object: str = "response"
    truncation: str = "disabled"
    store: bool = False
    background: bool = False
    completed_at: int | None = None


class ResponseEvent(msgspec.Struct, omit_defaults=True):
    """An event of a stream; its type says which fields it has."""

    type: str
    sequence_number: int
    response: ResponseBody | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputPart | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[ChosenToken] | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    name: str | UnsetType = UNSET

"""Fields that several requests of OpenAI's protocol share."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

MAX_ANSWERS = 16
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_WHOLE = (1 << 63) - 1

Temperature = Annotated[float, Meta(ge=0, le=1000)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Repetition = Annotated[float, Meta(ge=0.01, le=100)]
TopK = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Seed = Annotated[int, Meta(ge=-MAX_WHOLE, le=MAX_WHOLE)]
Tokens = Annotated[int, Meta(ge=1, le=MAX_WHOLE)]
Answers = Annotated[int, Meta(ge=1, le=MAX_ANSWERS)]
Likely = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Stops = Annotated[list[str], Meta(max_length=MAX_STOPS)]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class StreamOptions(msgspec.Struct):
    """What a stream has beside the answer."""

    include_usage: bool | None = None


class SamplingFields(msgspec.Struct):
    """What chats and completions ask alike; what is missing or null is as the server was started."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Stops | None = None
    seed: Seed | None = None
    n: Answers | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    repeat_penalty: Repetition | None = None  # llama-server's name
    logit_bias: dict[str, Bias] | None = None
    max_tokens: Tokens | None = None
    grammar: str | None = None  # GBNF or Lark


class TokensDetails(msgspec.Struct):
    """Tokens of the prompt that were not computed anew."""

    cached_tokens: int = 0


class AnswerDetails(msgspec.Struct):
    """Tokens of the answer that are reasoning."""

    reasoning_tokens: int = 0


class UsageBody(msgspec.Struct):
    """Tokens of a request and its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokensDetails
    completion_tokens_details: AnswerDetails


class ModelBody(msgspec.Struct):
    """A model."""

    id: str
    created: int
    owned_by: str = "dymoe"
    object: str = "model"
    meta: dict[str, Any] | None = None


class ModelList(msgspec.Struct):
    """All models of the server."""

    data: list[ModelBody]
    object: str = "list"

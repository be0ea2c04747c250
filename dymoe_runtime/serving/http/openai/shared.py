"""What the requests of OpenAI's protocol share: their settings, usage and log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from dymoe_runtime.serving.http.answers.backend import Backend, new_id
from dymoe_runtime.serving.http.answers.generation import Ask
from dymoe_runtime.serving.http.exchange.errors import bad_field
from dymoe_runtime.serving.http.openai.fields import AnswerDetails, SamplingFields, TokensDetails, UsageBody

if TYPE_CHECKING:  # long chains of imports, for annotations alone
    from dymoe_runtime.serving.http.answers.generation import Generation
    from dymoe_runtime.text.constraints.constraint import Constraint
    from dymoe_runtime.text.generate import Token
    from dymoe_runtime.text.tool_calls.parser import ToolCallParser

DONE = b"data: [DONE]\n\n"
# What stands for a part of a character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def sampling_values(backend: Backend, body: SamplingFields) -> dict[str, Any]:
    """Return the fields of SamplingParams that a request sets."""
    return {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repeat_penalty if body.repetition_penalty is None else body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": logit_bias(backend, body.logit_bias),
    }


def logit_bias(backend: Backend, bias: dict[str, float] | None) -> tuple[tuple[int, float], ...] | None:
    """Return (token id, bias) of each entry; raise ApiError if a name is no id of the vocabulary."""
    if not bias:
        return None
    for name in bias:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < backend.tokenizer.vocab_size):
            raise bad_field("logit_bias", f"'{name[:40]}' is no token id of the model; its ids are whole numbers")
    return tuple((int(name), value) for name, value in bias.items())


def stops(stop: str | list[str] | None) -> tuple[str, ...]:
    """Return the stop strings of a request."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def ask_of(
    backend: Backend,
    body: SamplingFields,
    max_tokens: int | None,
    logprobs: int | None,
    constraint: Callable[[], Constraint] | None,
    calls: Callable[[], ToolCallParser] | None = None,
) -> Ask:
    """Return what a chat or a completion asks for; raise ApiError for a token that is none of the model."""
    values = sampling_values(backend, body)
    return Ask(values, body.seed, stops(body.stop), max_tokens, logprobs, body.n or 1, constraint, calls)


def head_of(backend: Backend, prefix: str) -> tuple[str, int, str]:
    """Return a new id, the time in seconds since 1970, and the name of the model: the begin of each body."""
    return new_id(prefix), int(time.time()), backend.service.name


def streams_usage(body: SamplingFields) -> bool:
    """Return whether a stream ends with its usage."""
    return bool(body.stream_options and body.stream_options.include_usage)


def usage_of(generation: Generation) -> UsageBody:
    """Return the usage of a request."""
    usage = generation.usage
    return UsageBody(
        usage.prompt,
        usage.answer,
        usage.prompt + usage.answer,
        TokensDetails(usage.reused),
        AnswerDetails(usage.reasoning),
    )


class LikelyToken(msgspec.Struct):
    """A token, and the logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(LikelyToken):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[LikelyToken]


def chosen_token(backend: Backend, token: Token) -> ChosenToken:
    """Return the log-probabilities of a token."""
    likely = [LikelyToken(*_spelled(backend, token_id, value)) for token_id, value in token.top_logprobs]
    return ChosenToken(*_spelled(backend, token.id, token.logprob or 0.0), likely)


def spelling(backend: Backend, token_id: int) -> str:
    """Return the text of one token, also of a special one."""
    return backend.tokenizer.decode([token_id], skip_special_tokens=False)


def _spelled(backend: Backend, token_id: int, logprob: float) -> tuple[str, float, list[int] | None]:
    text = spelling(backend, token_id)
    # JSON has no infinities. A part of a character has no text, and so no bytes that this could tell.
    return text, max(logprob, -9999.0), None if REPLACEMENT in text else list(text.encode())

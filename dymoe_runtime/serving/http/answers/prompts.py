"""Prompts: messages by the chat template, or plain text, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dymoe_runtime.errors import DymoeError, TemplateFailed
from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.exchange.errors import ApiError, bad_field
from dymoe_runtime.serving.service.errors import TooLong
from dymoe_runtime.text.reasoning import SWITCHES

if TYPE_CHECKING:  # a long chain of imports, for annotations alone
    from dymoe_runtime.text.tokenizer import Tokenizer

Message = dict[str, Any]
# Variables that a request may not set: those of the conversation itself, and Python's own argument.
RESERVED = frozenset(("self", "messages", "tools", "add_generation_prompt"))
EFFORT = "reasoning_effort"
# Texts with more characters for each token of the context are counted first, in pieces of so many characters. A cut may
# part what is less than so many tokens as a whole.
FITTING, PIECE, CUT = 8, 1 << 16, 64
# Efforts by which requests ask for no reasoning at all.
NO_EFFORT = ("none", "minimal")


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, and its text if a chat template wrote it."""

    text: str | None
    ids: tuple[int, ...]


async def chat_prompt(
    backend: Backend,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    tools: Sequence[Any] | None = None,
) -> Prompt:
    """Return the prompt of a conversation; an assistant's message at its end is continued.

    `tools` are definitions in OpenAI's form.

    Raises ApiError if there is no chat template or no message, or if the template refuses them.
    """
    tokenizer = backend.tokenizer
    need_template(backend)
    if not messages:
        raise bad_field("messages", "it is empty; send at least one message")
    last = messages[-1]
    begun = last["content"] if last["role"] == "assistant" and not last.get("tool_calls") else ""
    asked = messages[:-1] if begun else messages
    if not asked:
        raise bad_field("messages", "an answer is begun that nobody asked for; send a user's message before it")
    values = {
        name: value for name, value in {**backend.settings.variables, **variables}.items() if name not in RESERVED
    }

    def render() -> Prompt:
        try:
            text = chat_text(tokenizer, asked, tools or None, values) + begun
        except TemplateFailed as error:  # whose own message is for who runs the server: it names files and flags
            raise ApiError(400, f"the chat template failed: {error.why}; change the messages") from error
        return Prompt(text, encoded(backend, text, add_special_tokens=False))

    return await backend.in_thread(render)


def chat_text(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any] | None, values: Mapping[str, Any]
) -> str:
    """Return a conversation as the chat template writes it.

    Agents send several system messages. Those at the begin become one, which every template takes, and where the
    template refuses a later one, it is the user's. Raises DymoeError if the template refuses that, too.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if first > 1:
        text = "\n\n".join(message["content"] for message in messages[:first])
        messages = [{"role": "system", "content": text}, *messages[first:]]
    try:
        return tokenizer.chat(messages, tools=tools, **values)
    except DymoeError:
        users = [{**m, "role": "user"} if i and m["role"] == "system" else m for i, m in enumerate(messages)]
        if users == list(messages):
            raise
        return tokenizer.chat(users, tools=tools, **values)


def need_template(backend: Backend) -> None:
    """Raise ApiError if there is no chat template."""
    if not backend.tokenizer.has_chat_template:
        raise ApiError(400, "the model has no chat template; send plain text to /v1/completions or /api/generate")


async def text_prompt(backend: Backend, text: str) -> Prompt:
    """Return the prompt of plain text."""
    return await backend.in_thread(lambda: Prompt(None, encoded(backend, text)))


def encoded(backend: Backend, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Return the token ids of a prompt; raise TooLong for one that surely does not fit, before all of it is encoded.

    Encoding takes far more time and memory than reading the request did.
    """
    tokenizer, room, surely = backend.tokenizer, backend.service.max_context, 0
    pieces = range(0, len(text), PIECE) if len(text) > FITTING * room else ()
    for at in pieces:
        surely += len(tokenizer.encode(text[at : at + PIECE], add_special_tokens=False)) - CUT
        if surely > room:
            raise TooLong(surely, room, backend.about.facts.get("max_context", room), more=True)
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def reasoning_variables(backend: Backend, thinks: bool | None = None, effort: str | None = None) -> dict[str, Any]:
    """Return the variables by which the chat template switches reasoning on or off, as far as it has any."""
    if thinks is None and effort is not None:
        thinks = effort not in NO_EFFORT
    switches = () if thinks is None else SWITCHES
    values: dict[str, Any] = {name: thinks for name in switches if name in backend.variables}
    return values | reasoning_effort(backend, effort)


def reasoning_effort(backend: Backend, effort: str | None) -> dict[str, Any]:
    """Return the variable by which the chat template says how much to think, if it has one."""
    return {EFFORT: effort} if effort is not None and EFFORT in backend.variables else {}


def reasoning_key(backend: Backend) -> str:
    """Return the key by which the chat template reads the reasoning of earlier answers.

    Raises ApiError if there is no chat template.
    """
    need_template(backend)
    return backend.tokenizer.splitter("").key

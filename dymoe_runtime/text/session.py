"""A conversation: what was said, and what of it the model still has in its cache."""

from __future__ import annotations

import bisect
import json
import threading
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json
from dymoe_runtime.prefix import shared_prefix
from dymoe_runtime.text import CONTEXT_POLICIES
from dymoe_runtime.text.background import in_background
from dymoe_runtime.text.constraints.constraint import Grammar
from dymoe_runtime.text.ending import Ending
from dymoe_runtime.text.generate import (
    LanguageModel,
    Token,
    Watch,
    answer_tokens,
    check_logprobs,
    check_params,
    check_prompt,
)
from dymoe_runtime.text.reasoning import Splitter
from dymoe_runtime.text.sampling import LIMITS, Sampler, SamplingParams
from dymoe_runtime.text.tokenizer import ModelOfBundle, Tokenizer
from dymoe_runtime.text.transcript import Transcript

Message = dict[str, Any]

# Share of the context that is taken once turns have left it, so that they leave many at once and seldom.
KEPT_SHARE = 0.75
SEEDS = int(LIMITS["seed"][1]) + 1


class RewindableModel(LanguageModel, Protocol):
    """A language model whose sequence can be seen and cut."""

    @property
    def tokens(self) -> Sequence[int]:
        """Return the ids of the tokens in the sequence."""

    def reset(self, position: int, /) -> int:
        """Forget the tokens from `position` on; return how many are kept, 0 if it cannot go back that far."""


@dataclass(frozen=True)
class Turn:
    """What a turn cost."""

    prompt_tokens: int  # of the whole conversation, as the template writes it
    reused_tokens: int  # of these, already in the model's cache
    answer_tokens: int
    finish: str | None  # None if the answer was left before its end

    @property
    def new_tokens(self) -> int:
        """Return the number of prompt tokens that the model had to compute."""
        return self.prompt_tokens - self.reused_tokens

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "new_tokens": self.new_tokens,
            "answer_tokens": self.answer_tokens,
            "finish": self.finish,
        }


class Session:
    """A conversation by the model's chat template. A turn computes only what is new.

    `messages` holds all that was said, also what has left the context. `unanswered` is a question whose turn failed.
    `dropped_turns` counts the turns that have left the context, and `last_turn` is what the last one cost.

    >>> from dymoe_runtime import load_model
    >>> with load_model("build/demo.dymoe") as model:
    ...     session = Session(model)
    ...     for turn in ("Hello", "And then?"):
    ...         answer = "".join(token.text for token in session.reply(turn, max_tokens=4))
    >>> [message["role"] for message in session.messages]
    ['user', 'assistant', 'user', 'assistant']
    """

    def __init__(
        self,
        model: RewindableModel,
        tokenizer: Tokenizer | None = None,
        system: str | None = None,
        *,
        history: Sequence[Mapping[str, Any]] = (),
        params: SamplingParams | None = None,
        variables: Mapping[str, Any] | None = None,
        context_policy: str = CONTEXT_POLICIES[0],
        grammar: Grammar | None = None,
    ) -> None:
        """Begin with a system message, if given, and the messages of `history`.

        The tokenizer is by default that of the model's bundle. `params` are by default those that the model's
        generation_config.json asks for. `variables` go to the chat template, such as `enable_thinking`. When the
        context is full, the oldest turns leave it, or with the policy "stop" the turn fails. Answers follow `grammar`.

        Raises DymoeError if there is no chat template, or none that takes these messages and variables, if `history`
        has a system message elsewhere than at its begin or beside `system`, or if an argument has a wrong type.
        """
        if context_policy not in CONTEXT_POLICIES:
            raise DymoeError(f"--context-policy {context_policy}: expected one of {', '.join(CONTEXT_POLICIES)}")
        _check_text(system or "", "the system message")
        _check_history(history, bool(system))
        check_params(params)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages += [dict(message) for message in history]
        self.unanswered: str | None = None
        self.dropped_turns = 0
        self.last_turn: Turn | None = None
        self._model = model
        self._tokenizer = tokenizer or Tokenizer.of(cast(ModelOfBundle, model))
        # How answers are sampled unless `reply` is told otherwise.
        self.params = self._tokenizer.sampling if params is None else params
        self._variables = dict(variables or {})
        self._grammar = grammar
        self._drops = context_policy == "drop"
        self._first = 0  # index of the first message, after the system message, that is in the context
        self._attempts = 1  # to answer the last question
        self._answering = threading.Lock()
        self._transcript = Transcript(self._tokenizer)
        self._tokenizer.check_variables(self._variables)
        self._render([*self.messages, {"role": "user", "content": ""}])

    def reply(
        self,
        text: str,
        params: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        *,
        logprobs: int | None = None,
    ) -> Generator[Token, None, None]:
        """Yield the tokens of the answer to the user's `text`.

        Both become messages once the answer has ended, was interrupted or the generator is closed; then the answer is
        what was said until then, or "". The arguments are those of
        `generate`; `params` hold for the following turns, too. Each answer draws random numbers from the seed anew, so
        that it depends on nothing but the conversation and, at a mixed point, on how much of the prompt the model still
        keeps: tiers are chosen for the tokens that are read together.

        Raises DymoeError if the question does not fit the context, or with the policy "stop" the conversation.
        """
        _check_text(text, "the question")
        check_logprobs(logprobs)
        self._set_params(params)
        ending = Ending.of(self._tokenizer, max_tokens, stop, (), ignore_eos)
        return self._answer(text, ending, logprobs)

    def reply_async(self, text: str, *args: Any, **options: Any) -> AsyncGenerator[Token, None]:
        """Return an asynchronous generator of what `reply` yields; see `generate_async`."""
        return in_background(self.reply(text, *args, **options))

    def retry(
        self,
        params: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Generator[Token, None, None]:
        """Forget the last answer and yield the tokens of another, with another seed.

        Raises DymoeError if there is no question.
        """
        self._set_params(params)
        ending = Ending.of(self._tokenizer, max_tokens, stop, (), ignore_eos)
        if self.unanswered is None:
            self._last_question()
        return self._answer(self.unanswered, ending)

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        with self._turn():
            self.messages = self.messages[: self._head]
            self.unanswered, self.last_turn, self.dropped_turns, self._first = None, None, 0, 0

    def set_system(self, text: str | None) -> None:
        """Replace the system message; raise DymoeError if the chat template takes none."""
        _check_text(text or "", "the system message")
        head: list[Message] = [{"role": "system", "content": text}] if text else []
        self._render([*head, {"role": "user", "content": ""}])
        with self._turn():
            moved = len(head) - self._head
            self.messages = [*head, *self.messages[self._head :]]
            if self._first:
                self._first += moved

    def to_json(self) -> str:
        """Return what `restore` needs, as JSON: the messages, and which tokens stand for which text."""
        state = {
            "messages": self.messages,
            "unanswered": self.unanswered,
            "first": self._first,
            "dropped_turns": self.dropped_turns,
            "pieces": self._transcript.to_json(),
            "attempts": self._attempts,
        }
        return json.dumps(state)

    def restore(self, text: str) -> None:
        """Go on with the conversation that `to_json` has written.

        Raises DymoeError, and changes nothing, if the text is no such conversation.
        """
        remedy = "start a new session"
        state = parse_json(text, "the conversation", remedy)
        try:
            messages, first, dropped = state["messages"], state["first"], state["dropped_turns"]
            unanswered, attempts = state["unanswered"], state["attempts"]
            sound = (
                all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages)
                and type(first) is type(dropped) is type(attempts) is int
                and 0 <= first <= len(messages)
                and min(dropped, attempts) >= 0
                and (unanswered is None or isinstance(unanswered, str))
            )
            transcript = Transcript(self._tokenizer)
            transcript.restore(state["pieces"])
        except (KeyError, TypeError) as error:
            raise DymoeError(f"the conversation is damaged ({error}); {remedy}") from error
        if not sound:
            raise DymoeError(f"the conversation is damaged; {remedy}")
        self._render([*messages, {"role": "user", "content": ""}])
        with self._turn():
            self.messages, self._first, self.dropped_turns, self.unanswered = messages, first, dropped, unanswered
            self._attempts, self._transcript = attempts, transcript

    @property
    def _head(self) -> int:
        """Return the number of messages that never leave the context."""
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def _set_params(self, params: SamplingParams | None) -> None:
        check_params(params)
        if params is not None:
            self.params = params

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Raise DymoeError while an answer is generated, because each turn begins with what the one before has said."""
        if not self._answering.acquire(blocking=False):
            raise DymoeError("an answer of this conversation has not ended; read it to its end, or close its generator")
        try:
            yield
        finally:
            self._answering.release()

    def _answer(
        self, question: str | None, ending: Ending, logprobs: int | None = None
    ) -> Generator[Token, None, None]:
        """Yield the tokens of the answer to a question; None is another answer to the last one."""
        with self._turn():
            is_new = question is not None
            self._attempts = 1 if is_new else self._attempts + 1
            if is_new:
                self.unanswered = question
                asked = [*self.messages, {"role": "user", "content": question}]
            else:
                asked = self.messages[: self._last_question() + 1]
            yield from self._answer_to(asked, is_new, ending, logprobs)

    def _last_question(self) -> int:
        """Return the index of the last message of the user; raise DymoeError if there is none."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise DymoeError("nothing has been asked yet; ask first")
        return asked[-1]

    def _answer_to(
        self, asked: list[Message], is_new: bool, ending: Ending, logprobs: int | None
    ) -> Generator[Token, None, None]:
        """Yield the tokens of the answer to the last of the messages; `is_new` if it has no other answer yet."""
        watch = Watch(self._model)
        prompt = self._prompt(asked)
        ids = self._transcript.encode(prompt)
        reused = watch.call(lambda: self._rewind(ids))
        new = ids[reused:]
        check_prompt(self._model, new)
        splitter = self._tokenizer.splitter(prompt)
        said = _Said(splitter)
        tokens = answer_tokens(
            self._model,
            self._tokenizer,
            new,
            Sampler(replace(self.params, seed=(self.params.seed + self._attempts - 1) % SEEDS)),
            ending,
            before=ids[:reused],
            logprobs=logprobs,
            splitter=splitter,
            constraint=None if self._grammar is None else self._grammar.constraint(),
            watch=watch,
            make_room=lambda answered: self._make_room(asked, answered, watch),
        )
        keeps = is_new
        try:
            for token in tokens:
                said.add(token)
                yield token
        except Exception:
            keeps = False
            raise
        finally:  # also where somebody interrupts the answer or closes the generator
            if said.ids or keeps:
                self._transcript.add_answer(said.ids)
                self.messages = [*asked, said.message]
                self.unanswered = None
                self.last_turn = Turn(len(ids), reused, len(said.ids), said.finish)

    def _rewind(self, ids: Sequence[int]) -> int:
        """Let the model forget what does not begin `ids`; return how many of these it keeps."""
        # The model may have been used by others since. At least one token must run, for its logits.
        return self._model.reset(min(shared_prefix(self._model.tokens, ids), len(ids) - 1))

    def _prompt(self, asked: list[Message]) -> str:
        """Return the prompt of a conversation; turns leave it if it does not fit."""
        prompt = self._render(self._window(asked, self._first))
        size, room = self._size(prompt), self._model.max_context
        if size <= room:
            return prompt
        if not self._drops:
            raise DymoeError(
                f"the conversation has {size} tokens, but the context holds {room}; start a new conversation, "
                "or leave out --context-policy stop"
            )
        first = self._without_oldest(asked, 0)
        shorter = self._render(self._window(asked, first))
        size = self._size(shorter)
        if size > room:
            with_system = " with the system message" if asked[0]["role"] == "system" else ""
            raise DymoeError(
                f"the question has {size} tokens{with_system}, but the context holds {room}; "
                "shorten it, or give a larger --context"
            )
        self._leave(asked, first)
        return shorter

    def _make_room(self, asked: list[Message], answered: Sequence[int], watch: Watch) -> np.ndarray | None:
        """Run the model on fewer turns and the answer so far; return its logits, or None if that does not help."""
        first = self._without_oldest(asked, len(answered)) if self._drops else self._first
        if first == self._first:
            return None
        ids = [*self._transcript.encode(self._render(self._window(asked, first))), *answered]
        if len(ids) >= self._model.max_context:
            return None
        self._leave(asked, first)
        kept = watch.call(lambda: self._rewind(ids))
        return watch.call(lambda: self._model.prefill(ids[kept:]))

    def _without_oldest(self, asked: list[Message], answered: int) -> int:
        """Return the index of the first message that stays when the oldest turns leave the context.

        So many leave that KEPT_SHARE of the context is left, but never the last one. `answered` is the number of tokens
        that follow the prompt.
        """
        starts = self._turns(asked)
        goal = int(KEPT_SHARE * self._model.max_context)

        def fits(start: int) -> bool:
            return self._size(self._render(self._window(asked, start))) + answered <= goal

        index = min(bisect.bisect_left(starts, True, lo=1, key=fits), len(starts) - 1)
        return starts[index] if index else self._first

    def _leave(self, asked: list[Message], first: int) -> None:
        """Let the turns before the message of index `first` leave the context."""
        self.dropped_turns += sum(start < first for start in self._turns(asked))
        self._first = first

    def _turns(self, messages: list[Message]) -> list[int]:
        """Return the indices of the first messages of the turns in the context."""
        return [i for i, message in enumerate(messages) if message["role"] == "user" and i >= self._first]

    def _window(self, messages: list[Message], first: int) -> list[Message]:
        """Return the messages that are in the context when it begins with the one of index `first`."""
        head = int(bool(messages) and messages[0]["role"] == "system")
        return [*messages[:head], *messages[max(head, first) :]]

    def _size(self, prompt: str) -> int:
        return self._transcript.count(prompt)

    def _render(self, messages: Sequence[Message]) -> str:
        return self._tokenizer.chat(messages, **self._variables)


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise DymoeError(f"{what} is of type {type(value).__name__}; give a text")


def _check_history(history: object, has_system: bool) -> None:
    """Raise DymoeError unless `history` is a sequence of messages, with at most one system message, at its begin."""
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise DymoeError(f"the history is of type {type(history).__name__}; give a list of messages")
    for number, message in enumerate(history):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DymoeError(f"message {number} of the history has no role and content; give them to each message")
        if message["role"] == "system" and (number or has_system):
            raise DymoeError(
                "the history has a system message beside another or after other messages; give one, at the begin"
            )


class _Said:
    """An answer so far."""

    def __init__(self, splitter: Splitter) -> None:
        self.ids: list[int] = []
        self.finish: str | None = None
        self._text = self._reasoning = ""
        self._key = splitter.key

    def add(self, token: Token) -> None:
        """Take the next token."""
        self.ids.append(token.id)
        self._text += token.text
        self._reasoning += token.reasoning
        self.finish = token.finish

    @property
    def message(self) -> Message:
        """Return the answer as a message."""
        reasoning = {self._key: self._reasoning} if self._reasoning else {}
        return {"role": "assistant", "content": self._text, **reasoning}

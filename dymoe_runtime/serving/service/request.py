"""What a service takes and gives: a request, an answer token by token, and the state of the service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # long chains of imports, for annotations alone
    from dymoe_runtime.text.constraints.constraint import Constraint
    from dymoe_runtime.text.ending import Ending
    from dymoe_runtime.text.generate import Token
    from dymoe_runtime.text.sampling import SamplingParams
    from dymoe_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to answer, and how."""

    # Rendered by the chat template: its end tells the splitter of reasoning whether the answer begins inside marks.
    # None for plain text, whose answer is not split.
    prompt: str | None
    ids: tuple[int, ...]  # token ids of the prompt
    params: SamplingParams
    ending: Ending
    logprobs: int | None = None  # as many likeliest tokens have their log-probabilities; None gives none at all
    constraint: Constraint | None = None  # a fresh one for each request
    client: str = ""  # who asks; clients take turns


@dataclass(frozen=True)
class ServiceState:
    """How busy a service is, and its memory in bytes."""

    slots: int  # requests that can run at once
    busy: int  # slots that run a request
    queued: int  # requests that wait for a slot
    queue_limit: int  # most requests that may wait
    memory_bytes: int  # budget of the process
    resident_bytes: int  # resident set of the process


class Answer(Protocol):
    """The tokens of one answer; the last one has a `finish`. Errors during the answer are raised as DymoeError."""

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens of the prompt."""

    @property
    def reused_tokens(self) -> int:
        """Return how many tokens of the prompt were not computed anew; known once the first token has come."""

    def __aiter__(self) -> AsyncIterator[Token]:
        """Return the iterator over the tokens; there is one for each answer."""

    def cancel(self) -> None:
        """End the answer and free its slot within one step; any thread may call it, any number of times.

        The iteration then ends soon, without a token that has a `finish`.
        """

    async def aclose(self) -> None:
        """Do as `cancel` does."""


class Service(Protocol):
    """A loaded model that answers requests."""

    @property
    def name(self) -> str:
        """Return the name of the model."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the model."""

    @property
    def max_context(self) -> int:
        """Return the most tokens of a prompt and its answer."""

    @property
    def digest(self) -> str:
        """Return the digest of the bundle's manifest."""

    def submit(self, request: GenerationRequest) -> Answer:
        """Put a request in the queue; any thread may call it.

        Raises Full when the queue has no room, Closing when the service ends, and DymoeError if the request cannot run.
        """

    def state(self) -> ServiceState:
        """Return how busy the service is."""

    def statistics(self) -> dict[str, Any]:
        """Return the statistics of the model, as `Model.statistics` does, and counters of the service."""

    async def close(self, grace_s: float) -> None:
        """Take no more requests; end after those that run, and after `grace_s` seconds at the latest."""

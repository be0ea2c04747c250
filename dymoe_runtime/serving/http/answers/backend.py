"""What all handlers have: the service, the settings, what is known of the model, and the metrics."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dymoe_runtime.serving.http.answers.metrics import Metrics
from dymoe_runtime.serving.http.answers.settings import Settings
from dymoe_runtime.serving.http.exchange.bodies import Bodies

if TYPE_CHECKING:  # long chains of imports, for annotations alone
    from dymoe_runtime.serving.http.answers.grammars import CompiledGrammars
    from dymoe_runtime.serving.service.request import Service
    from dymoe_runtime.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What lists of models say of this one."""

    version: str  # of this program
    family: str  # the model type of the checkpoint
    size_bytes: int  # of the bundle
    parameters: int  # number of weights of all experts
    precision: str  # the operating point
    created: float = field(default_factory=time.time)  # seconds since 1970
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the model's specification


class Backend:
    """The service and what surrounds it."""

    def __init__(self, service: Service, settings: Settings, about: About, grammars: CompiledGrammars) -> None:
        """Read the chat template, so that the first request does not wait for it."""
        self.service, self.settings, self.about = service, settings, about
        self.metrics, self.bodies = Metrics(service), Bodies(settings.max_body_bytes)
        self.open_answers = 0
        self.closing = False
        tokenizer = service.tokenizer
        self.grammars = grammars
        self.variables = tokenizer.template_variables if tokenizer.has_chat_template else frozenset[str]()
        self.special = {token_id: text for text, token_id in tokenizer.special_ids.items()}
        # Long texts take a while to render and encode; other answers go on meanwhile.
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="texts")

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the model."""
        return self.service.tokenizer

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, computed beside the answers."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, work)

    async def end(self, grace_s: float) -> None:
        """Take no more requests, and end after those that run, after `grace_s` seconds at the latest."""
        self.closing = True
        await self.service.close(grace_s)

    def close(self) -> None:
        """End the thread."""
        self._texts.shutdown()


def new_id(prefix: str) -> str:
    """Return a new identifier, such as chatcmpl-4f…."""
    return prefix + secrets.token_hex(12)

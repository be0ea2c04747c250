"""A service whose requests run together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.process import resident_bytes
from dymoe_runtime.serving.service.batching.answer import QueuedAnswer
from dymoe_runtime.serving.service.batching.inbox import Inbox
from dymoe_runtime.serving.service.batching.scheduler import Scheduler
from dymoe_runtime.serving.service.errors import TooLong
from dymoe_runtime.serving.service.request import GenerationRequest, ServiceState

if TYPE_CHECKING:  # long chains of imports, for annotations alone
    from dymoe_runtime.engine.batch.model import BatchModel
    from dymoe_runtime.serving.service.batching.prompt_cache import PromptCache
    from dymoe_runtime.text.tokenizer import Tokenizer

# How often `close` looks whether the requests have ended.
POLL_S = 0.05


@dataclass(frozen=True)
class Identity:
    """Name of a model, digest of its bundle's manifest, and the budget of the process in bytes."""

    name: str
    digest: str
    memory_bytes: int

    @staticmethod
    def of(path: Path, digest: str, memory_bytes: int, name: str | None = None) -> Identity:
        """Name a model after the folder of its bundle, unless it has a name."""
        return Identity(name or path.resolve().name.removesuffix(".dymoe"), digest, memory_bytes)


class BatchingService:
    """A `Service` that runs as many requests together as the model has sequences."""

    def __init__(
        self,
        model: BatchModel,
        tokenizer: Tokenizer,
        identity: Identity,
        queue_limit: int = 64,
        cache: PromptCache | None = None,
    ) -> None:
        """Take a loaded model, which nobody else may use until the service is closed."""
        self.name, self.digest = identity.name, identity.digest
        self.tokenizer, self.max_context = tokenizer, model.max_context
        self._model, self._memory_bytes, self._limit = model, identity.memory_bytes, queue_limit
        self._inbox = Inbox(queue_limit, len(model.sequences))
        self._scheduler = Scheduler(model, tokenizer, self._inbox, cache)
        self._thread = threading.Thread(target=self._scheduler.run, name="service", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> QueuedAnswer:
        self._check(request.ids)
        answer = QueuedAnswer(request)
        self._inbox.add(answer)
        return answer

    def state(self) -> ServiceState:
        slots = len(self._model.sequences)
        busy, queued = self._inbox.busy(), self._inbox.waiting()
        return ServiceState(slots, busy, queued, self._limit, self._memory_bytes, resident_bytes())

    def statistics(self) -> dict[str, Any]:
        return {**self._model.statistics(), "answers": self._inbox.answered}

    async def close(self, grace_s: float) -> None:
        self._inbox.close()
        deadline = asyncio.get_running_loop().time() + grace_s
        while self._thread.is_alive() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(POLL_S)
        self._inbox.end_all()
        while self._thread.is_alive():
            await asyncio.sleep(POLL_S)

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise DymoeError("the prompt is empty; give it at least one token of text")
        if len(ids) > self.max_context:
            raise TooLong(len(ids), self.max_context, self._model.spec.max_context)

"""The simplest service: one slot, whose requests run one after another in a thread."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.process import resident_bytes
from dymoe_runtime.serving.service.errors import Closing, Full
from dymoe_runtime.serving.service.request import GenerationRequest, ServiceState
from dymoe_runtime.text.generate import LanguageModel, Token, answer_tokens
from dymoe_runtime.text.sampling import Sampler
from dymoe_runtime.text.tokenizer import Tokenizer
from dymoe_runtime.text.transcript import shared_prefix

# Seconds that a request takes, as long as none has ended yet.
FIRST_GUESS_S = 5.0
# The average of seconds moves by this part of a difference.
SMOOTHING = 4
# How often `close` looks whether the requests have ended.
POLL_S = 0.05

log = logging.getLogger(__name__)


class ServedModel(LanguageModel, Protocol):
    """A loaded model, as a service uses it."""

    @property
    def tokens(self) -> Sequence[int]:
        """Return the ids of the tokens in the sequence."""

    def reset(self, position: int, /) -> int:
        """Forget the tokens from `position` on; return how many are kept, 0 if it cannot go back that far."""

    def statistics(self) -> dict[str, Any]:
        """Return the statistics of the run so far."""

    def interrupt_when(self, asked: Any, /) -> None:
        """End a pass with KeyboardInterrupt once `asked()` is true."""


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


class QueuedAnswer:
    """The answer to one request; a thread adds its tokens, and one reader awaits them."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.prompt_tokens, self.reused_tokens = len(request.ids), 0
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        self._items: deque[Token | DymoeError | None] = deque()  # None is the end
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._tokens()

    async def _tokens(self) -> AsyncIterator[Token]:
        arrived = asyncio.Event()
        with self._lock:
            self._waiting = (asyncio.get_running_loop(), arrived)
        while True:
            arrived.clear()
            while self._items:
                item = self._items.popleft()
                if isinstance(item, DymoeError):
                    raise item
                if item is None:
                    return
                yield item
            if not self._items:
                await arrived.wait()

    def add(self, item: Token | DymoeError | None) -> None:
        """Add a token, the error that ended the answer, or None for its end."""
        with self._lock:
            self._items.append(item)
            if self._waiting is not None and not self._waiting[0].is_closed():
                self._waiting[0].call_soon_threadsafe(self._waiting[1].set)

    def cancel(self) -> None:
        if not self.cancelled.is_set():
            self.cancelled.set()
            self.add(None)

    async def aclose(self) -> None:
        self.cancel()


@dataclass
class _Queue:
    """Requests that wait, and what is known of those before them."""

    waiting: deque[QueuedAnswer] = field(default_factory=deque)
    running: QueuedAnswer | None = None
    closing: bool = False
    answered: int = 0
    seconds: float = FIRST_GUESS_S  # of the answers of late, on average


class OneAtATime:
    """A service that runs requests one after another, in the order in which they came.

    A request computes only what its prompt does not share with the one before.
    """

    def __init__(self, model: ServedModel, tokenizer: Tokenizer, identity: Identity, queue_limit: int = 64) -> None:
        """Take a loaded model, which nobody else may use until the service is closed."""
        self.name, self.digest = identity.name, identity.digest
        self.tokenizer, self.max_context = tokenizer, model.max_context
        self._model, self._memory_bytes, self._limit = model, identity.memory_bytes, queue_limit
        self._queue, self._changed = _Queue(), threading.Condition()
        model.interrupt_when(lambda: self._queue.running is not None and self._queue.running.cancelled.is_set())
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> QueuedAnswer:
        self._check(request.ids)
        answer = QueuedAnswer(request)
        with self._changed:
            queue = self._queue
            if queue.closing:
                raise Closing
            queue.waiting = deque(waiting for waiting in queue.waiting if not waiting.cancelled.is_set())
            if len(queue.waiting) >= self._limit:
                raise Full(max(1.0, queue.seconds * len(queue.waiting)))
            queue.waiting.append(answer)
            self._changed.notify()
        return answer

    def state(self) -> ServiceState:
        queue = self._queue
        queued = sum(not waiting.cancelled.is_set() for waiting in tuple(queue.waiting))
        return ServiceState(
            1, int(queue.running is not None), queued, self._limit, self._memory_bytes, resident_bytes()
        )

    def statistics(self) -> dict[str, Any]:
        return {**self._model.statistics(), "answers": self._queue.answered}

    async def close(self, grace_s: float) -> None:
        with self._changed:
            self._queue.closing = True
            self._changed.notify()
        deadline = asyncio.get_running_loop().time() + grace_s
        while self._thread.is_alive() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(POLL_S)
        with self._changed:
            running = [self._queue.running] if self._queue.running is not None else []
            for answer in (*running, *self._queue.waiting):
                answer.add(Closing())
                answer.cancel()
            self._queue.waiting.clear()
        while self._thread.is_alive():
            await asyncio.sleep(POLL_S)

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise DymoeError("the prompt is empty; give it at least one token of text")
        if len(ids) > self.max_context:
            raise DymoeError(
                f"the prompt has {len(ids)} tokens, but the context holds {self.max_context}; shorten the prompt"
            )

    def _run(self) -> None:
        while (answer := self._next()) is not None:
            started = time.monotonic()
            try:
                self._answer(answer)
            except DymoeError as error:
                answer.add(error)
            except KeyboardInterrupt:  # how a pass ends whose answer was cancelled
                pass
            except Exception:  # a fault of this program must not leave those that wait without an answer
                log.exception("an answer failed")
                answer.add(DymoeError("the answer failed by a fault of the server, which its log has"))
            finally:
                answer.add(None)
                with self._changed:
                    self._queue.running = None
                    self._queue.seconds += (time.monotonic() - started - self._queue.seconds) / SMOOTHING

    def _next(self) -> QueuedAnswer | None:
        """Return the next request once there is one, or None when the service ends."""
        with self._changed:
            while True:
                while self._queue.waiting:
                    answer = self._queue.waiting.popleft()
                    if not answer.cancelled.is_set():
                        self._queue.running = answer
                        return answer
                if self._queue.closing:
                    return None
                self._changed.wait()

    def _answer(self, answer: QueuedAnswer) -> None:
        request, model = answer.request, self._model
        ids = request.ids
        kept = model.reset(min(shared_prefix(model.tokens, ids), len(ids) - 1))
        answer.reused_tokens = kept
        tokens = answer_tokens(
            model,
            self.tokenizer,
            ids[kept:],
            Sampler(request.params),
            request.ending,
            before=ids[:kept],
            logprobs=request.logprobs,
            constraint=request.constraint,
            splitter=None if request.prompt is None else self.tokenizer.splitter(request.prompt),
        )
        for token in tokens:
            if answer.cancelled.is_set():
                break
            answer.add(token)
        self._queue.answered += 1

"""Answers that a thread computes and readers await."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from dymoe_runtime.errors import DymoeError

if TYPE_CHECKING:  # long chains of imports, for annotations alone
    from dymoe_runtime.serving.service.request import GenerationRequest
    from dymoe_runtime.text.generate import Token


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

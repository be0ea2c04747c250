"""Iteration in a thread of its own, for programs that await."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def in_background(items: Generator[T, None, None]) -> AsyncGenerator[T, None]:
    """Yield what `items` yields, each computed in one and the same thread; close `items` at the end."""
    loop, end = asyncio.get_running_loop(), object()
    executor = ThreadPoolExecutor(1, thread_name_prefix="generate")
    try:
        while True:
            item = await loop.run_in_executor(executor, next, items, end)
            if item is end:
                return
            yield item  # type: ignore[misc]
    finally:
        # The thread may still compute an item that nobody awaits any more; closing waits its turn there.
        closing, cancelled = loop.run_in_executor(executor, items.close), False
        while not closing.done():
            try:
                await asyncio.wait([closing])
            except asyncio.CancelledError:  # whoever cancels once more must not use what the thread still uses
                cancelled = True
        executor.shutdown()
        closing.result()
        if cancelled:
            raise asyncio.CancelledError

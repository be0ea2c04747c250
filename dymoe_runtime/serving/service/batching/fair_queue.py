"""The queue of requests that wait: clients take turns, so that none waits for all requests of another."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """What waits in a queue."""

    @property
    def client(self) -> str:
        """Return who asks."""


Q = TypeVar("Q", bound=Queued)


class FairQueue(Generic[Q]):
    """Items by client. Clients take turns; of one client, the first to come is the first to go."""

    def __init__(self) -> None:
        self._by_client: OrderedDict[str, deque[Q]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, tuple(self._by_client.values())))

    def add(self, item: Q) -> None:
        """Add an item behind those of its client."""
        self._by_client.setdefault(item.client, deque()).append(item)

    def add_first(self, item: Q) -> None:
        """Add an item that is the next."""
        self._by_client.setdefault(item.client, deque()).appendleft(item)
        self._by_client.move_to_end(item.client, last=False)

    def take(self) -> Q | None:
        """Remove and return the next item, or None if there is none."""
        if not self._by_client:
            return None
        client, items = self._by_client.popitem(last=False)
        item = items.popleft()
        if items:
            self._by_client[client] = items  # behind all other clients
        return item

    def clear(self) -> list[Q]:
        """Remove and return all items."""
        items = [item for items in self._by_client.values() for item in items]
        self._by_client.clear()
        return items

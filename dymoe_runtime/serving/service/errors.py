"""Refusals of a service that has no room, or ends."""

from __future__ import annotations

from dymoe_runtime.errors import DymoeError


class Full(DymoeError):
    """The queue has no room for another request; try again after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: float) -> None:
        """Say how many seconds to wait."""
        super().__init__(f"the server is busy and its queue is full; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class Closing(DymoeError):
    """The service ends and takes no more requests."""

    def __init__(self) -> None:
        super().__init__("the server is ending and takes no more requests; try again later")


class TooLong(DymoeError):
    """The prompt has more tokens than the context."""

    def __init__(self, tokens: int, context: int, longest: int, more: bool = False) -> None:
        """Say how many tokens there are, or at least, with `more`, and what helps.

        `longest` is the longest context of the model.
        """
        count = f"more than {tokens}" if more else f"{tokens}"
        longer = f", or start the server with a larger --context, up to {longest}" if longest > context else ""
        super().__init__(f"the prompt has {count} tokens, but the context holds {context}; shorten the prompt{longer}")

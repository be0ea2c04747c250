"""Limits of the bodies of requests: of each, and of all that are in memory at once."""

from __future__ import annotations

from dymoe_runtime.serving.http.exchange.errors import ApiError

# All bodies together, as a multiple of the longest one.
TOGETHER = 4


class Bodies:
    """Counts the bytes of the requests that have not been answered yet."""

    def __init__(self, most: int) -> None:
        """Take the most bytes of one body."""
        self.most = most
        self.held = 0

    def begin(self) -> Taken:
        """Return the count of a new request."""
        return Taken(self)

    def end(self, taken: Taken) -> None:
        """Forget a request."""
        self.held -= taken.nbytes
        taken.nbytes = 0


class Taken:
    """The bytes of one request so far."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.nbytes = 0

    def check(self, nbytes: int) -> None:
        """Raise ApiError if a body of so many bytes is too long, or there is no room for it now."""
        bodies = self._bodies
        # The connection stays open, and uvicorn drops the rest of the body: a client that still sends would lose the
        # answer if the connection closed.
        if nbytes > bodies.most:
            raise ApiError(413, f"the body has more than {bodies.most:,} bytes; send less", code="body_too_large")
        if bodies.held - self.nbytes + nbytes > TOGETHER * bodies.most:
            raise ApiError(
                429,
                "other long requests are in work; try again in a second",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )

    def add(self, nbytes: int) -> None:
        """Count further bytes; raise ApiError as `check` does."""
        self.check(self.nbytes + nbytes)
        self.nbytes += nbytes
        self._bodies.held += nbytes

"""Fixtures of the store's tests: stores that are closed, on Python's threads or compiled ones, and no hangs."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from store_kit import StoreFactory

# A test has hung after so long, or after HANG_S of its module.
HANG_S = 20.0


@pytest.fixture(autouse=True)
def no_hang(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that hangs, be it in a loop or waiting for a lock."""
    seconds = getattr(request.module, "HANG_S", HANG_S)

    def stop(signum: int, frame: object) -> None:
        raise AssertionError(f"still not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def make(no_hang: None, request: pytest.FixtureRequest) -> Iterator[StoreFactory]:
    """Make stores on Python's threads, or on those that the test is parametrized with.

    The compiled ones call the reader in no exact order.
    """
    factory = StoreFactory(getattr(request, "param", None))
    yield factory
    factory.close()

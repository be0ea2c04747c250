"""A server on the shipped model, in a process of its own, and others that tests may end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving.kit import MAX_TOKENS, Running, serving


@pytest.fixture(scope="session")
def server(shipped_path: Path) -> Iterator[Running]:
    """A server of short, greedy answers. It must live."""
    with serving(shipped_path, "--max-tokens", MAX_TOKENS, "--model-name", "demo") as running:
        yield running


@pytest.fixture
def serve(shipped_path: Path) -> Callable[..., Any]:
    """Serve the shipped model with further flags, for one test."""
    return lambda *args, **options: serving(shipped_path, *args, **options)

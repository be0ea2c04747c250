"""What the flags of a server say about all requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import read_text
from dymoe_runtime.text.sampling import SamplingParams

MAX_BODY_BYTES = 8 << 20
TIME_LIMIT_S = 3600.0
MIN_KEY = 8


@dataclass(frozen=True)
class Settings:
    """Limits, keys, and what requests do not say themselves."""

    params: SamplingParams = field(default_factory=SamplingParams)  # where a request says nothing
    seed: int | None = None  # where a request has none; None takes another one each time
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None  # most tokens of an answer
    max_body_bytes: int = MAX_BODY_BYTES
    time_limit_s: float = TIME_LIMIT_S  # of an answer, from its request on
    keys: tuple[str, ...] = ()  # API keys; none lets everybody in
    origins: tuple[str, ...] = ()  # of web pages that may use the server; "*" is all
    local: bool = True  # listens on a loopback address, so that a Host header of another name is an attack


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the API keys in a file: one a line; blank lines and those that begin with # are skipped.

    Raises DymoeError if the file cannot be read, has no key, or has one that no header can carry.
    """
    remedy = "give a file with one key a line"
    lines = (line.strip() for line in read_text(path, remedy).splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise DymoeError(f"--api-key-file {path}: it has no key; {remedy}")
    for number, key in enumerate(keys, 1):
        if not key.isascii() or not key.isprintable() or " " in key or len(key) < MIN_KEY:
            raise DymoeError(
                f"--api-key-file {path}: key {number} is not {MIN_KEY} or more printable ASCII characters without "
                "spaces; write another one"
            )
    return keys

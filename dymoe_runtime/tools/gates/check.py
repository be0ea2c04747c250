"""The gates of a bundle, cheap ones first: where one of these fails, nothing is measured any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.policy import OperatingPoint
from dymoe_runtime.bundle.records import check_digest
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.tools.findings import kl_intervals
from dymoe_runtime.tools.gates.gate import BYTES, DIGEST, FAILED, NATS, PASSED, RATE, SKIPPED, Gate, at_least, at_most
from dymoe_runtime.tools.intervals import Interval


@dataclass(frozen=True)
class Device:
    """The device of a profile: the memory that it has, and the least with which the bundle runs, in bytes."""

    name: str
    memory_bytes: int
    floor_bytes: int


@dataclass(frozen=True)
class Limits:
    """What is asked for; None asks for nothing."""

    digest: str | None = None
    nbytes: int | None = None
    kl: float | None = None
    tokens_per_s: float | None = None
    device: Device | None = None


@dataclass(frozen=True)
class Quality:
    """A KL in nats per token, with its 95% interval, or None where that is not known."""

    kl: float
    interval: Interval | None
    detail: str


Scores = Callable[[], Sequence[Mapping[str, Any]]]


def compiled_quality(bundle: Bundle, point: OperatingPoint) -> Quality:
    """Return the KL that the compiler measured at `point`, on calibration text that it had kept apart."""
    detail = f"point {point.name}, as measured when it was compiled"
    return Quality(point.kl, kl_intervals(bundle).get(point.name), detail)


def check(
    bundle: Bundle, limits: Limits, known: Quality | None, scores: Scores, speed: Callable[[], float]
) -> list[Gate]:
    """Return a gate for each of the limits.

    `known` is the KL that the compiler measured, or None if `scores` measures that of texts, as `distances` does;
    `speed` measures tokens/s. Neither is called where a gate that needs no measurement has failed.
    """
    gates = list(_cheap(bundle, limits, known))
    names = [gate.gate for gate in gates if gate.status == FAILED]
    for make, skipped in _costly(limits, known, scores, speed):
        gates += [skipped(f"not measured, because it failed at {', '.join(names)}")] if names else make()
    return gates


def _cheap(bundle: Bundle, limits: Limits, known: Quality | None) -> Iterator[Gate]:
    if limits.digest is not None:
        yield _digest(bundle, limits.digest)
    if limits.nbytes is not None:
        yield at_most("size", shipped_bytes(bundle), limits.nbytes, BYTES)
    if limits.device is not None:
        device = limits.device
        yield at_most("memory", device.floor_bytes, device.memory_bytes, BYTES, f"profile {device.name}")
    if limits.kl is not None and known is not None:
        yield at_most("quality", known.kl, limits.kl, NATS, known.detail, known.interval)


def _costly(
    limits: Limits, known: Quality | None, scores: Scores, speed: Callable[[], float]
) -> Iterator[tuple[Callable[[], list[Gate]], Callable[[str], Gate]]]:
    """Yield functions that measure a gate, each with one that makes the gate without measuring, from the reason."""
    if limits.kl is not None and known is None:
        yield partial(_qualities, limits.kl, scores), partial(Gate, "quality", SKIPPED, None, limits.kl, NATS)
    if limits.tokens_per_s is not None:
        wanted = limits.tokens_per_s
        yield partial(_speed, wanted, speed), partial(Gate, "speed", SKIPPED, None, wanted, RATE)


def _qualities(limit: float, scores: Scores) -> list[Gate]:
    return [
        at_most(f"quality: {text['file']}", text["kl"], limit, NATS, f"on {text['tokens']} tokens", text["kl_interval"])
        for text in scores()
    ]


def _speed(wanted: float, speed: Callable[[], float]) -> list[Gate]:
    return [at_least("speed", speed(), wanted, RATE, "decoding on this machine")]


def _digest(bundle: Bundle, expected: str) -> Gate:
    found = bundle.manifest.digest
    if found == expected.lower():
        try:
            check_digest(bundle, expected)
        except DymoeError as error:
            return Gate("digest", FAILED, found, expected, DIGEST, str(error))
    return Gate("digest", PASSED if found == expected.lower() else FAILED, found, expected, DIGEST)


def shipped_bytes(bundle: Bundle) -> int:
    """Return the bytes that are shipped: those of the packed file, or of all files in the directory."""
    return bundle.path.stat().st_size if bundle.path.is_file() else bundle.total_bytes()

"""Traces: JSON lines of what each layer of each pass requested, found and waited for, and replay of their tiers.

docs/trace.md describes the lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.engine.precision import Chosen
from dymoe_runtime.errors import DymoeError, remedy_of
from dymoe_runtime.files import Bytes, open_regular, parse_json, strict
from dymoe_runtime.model.routing import Experts, PromptRouting, Routing
from dymoe_runtime.spec import Factor, Number
from dymoe_runtime.store.request import ExpertRequest
from dymoe_runtime.store.stats import StoreStats

REMEDY = "make a trace with dymoe-run --trace"
MAX_LINE_BYTES = 16 << 20


class Counted(Protocol):
    """Anything that has the statistics of a store."""

    @property
    def stats(self) -> StoreStats:
        """Return the statistics so far."""


class Tracer:
    """A writer of traces: one JSON line for each layer of a pass, then one for the whole pass.

    Writing and closing raise DymoeError if the file cannot be written.
    """

    def __init__(self, path: Path, store: Counted, budget: Budget) -> None:
        """Begin a trace at `path`, of a run within `budget`; a file that exists is replaced."""
        self._path = path
        try:
            self._stream = path.open("w", encoding="utf-8")
        except OSError as error:
            raise DymoeError(f"{path}: the trace cannot be written ({error.strerror}); name another file") from error
        self._store = store
        self._budget = budget
        self._pass = 0
        self._requests: Sequence[ExpertRequest] = ()
        self._before = replace(store.stats)

    def note_requests(self, requests: Sequence[ExpertRequest]) -> None:
        """Keep the store requests of the current layer for its line."""
        self._requests = requests

    def layer(self, layer: int, tokens: int, weights: np.ndarray, run: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the result of `run`, the experts of a layer, and write the layer's line.

        `weights` are the routing weights [T, k].
        """
        self.note_requests(())
        started = time.perf_counter()
        y = run()
        seconds = time.perf_counter() - started
        before, now = self._before, replace(self._store.stats)
        line: dict[str, Any] = {"pass": self._pass, "tokens": tokens, "layer": layer}
        line["wants"] = [[request.key.expert, request.tier, request.tokens] for request in self._requests]
        if tokens == 1:
            line["gates"] = [round(weight, 6) for weight in weights[0].tolist()]
        line["hits"] = now.hits - before.hits
        line["read_bytes"] = now.read_bytes - before.read_bytes
        line["look_ahead_bytes"] = now.prefetch_bytes - before.prefetch_bytes
        line["wait_s"] = now.wait_s - before.wait_s
        self._before = now
        self._write(line | {"seconds": seconds})
        return y

    def reset_stats(self) -> None:
        """Start from 0 again, because the store's statistics were reset."""
        self._before = StoreStats()

    def end_pass(self, tokens: int, seconds: float, point: str, prompt: bool) -> None:
        """Write the line of a whole pass, which took `seconds` at the operating point `point`."""
        line = {"pass": self._pass, "tokens": tokens, "seconds": seconds, "point": point, "prompt": prompt}
        self._write(line | {"memory_bytes": self._budget.memory_bytes, "arena_bytes": self._budget.arena_bytes})
        self._pass += 1

    def close(self) -> None:
        """Close the file."""
        with self._writing():
            self._stream.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._writing():
            self._stream.write(json.dumps(line) + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                self._stream.close()
            raise DymoeError(
                f"{self._path}: cannot be written ({error.strerror}); "
                f"{remedy_of(error, 'choose another place')}, or leave --trace out"
            ) from error


class TracedExperts:
    """`Experts` that write each call to a trace."""

    def __init__(self, experts: Experts, tracer: Tracer) -> None:
        self._experts, self._tracer = experts, tracer

    def decode(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        run = self._experts.decode
        return self._tracer.layer(layer, len(h), routing.weights, lambda: run(layer, h, routing))

    def prefill(self, layer: int, h: np.ndarray, routing: PromptRouting) -> np.ndarray:
        run = self._experts.prefill
        return self._tracer.layer(layer, len(h), routing.weights, lambda: run(layer, h, routing))


def read_trace(path: Path, bundle: Bundle) -> Iterator[dict[str, Any]]:
    """Yield the lines of a trace, at least one; raise DymoeError if it is not a trace of `bundle`."""
    number = 0
    with open(open_regular(path, REMEDY), "rb") as lines:
        try:
            while text := lines.readline(MAX_LINE_BYTES):
                number += 1
                where = f"{path}: not a trace: line {number}"
                line = parse_json(text, where, REMEDY)
                of_layer = strict(_LayerLine if "layer" in line else _PassLine, _python_names(line), where, REMEDY)
                if isinstance(of_layer, _LayerLine) and not _fits(of_layer, bundle):
                    raise DymoeError(f"{path}: not a trace of this bundle (line {number}); {REMEDY}")
                yield line
        except OSError as error:
            raise DymoeError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
        except UnicodeDecodeError as error:
            raise DymoeError(f"{path}: not a trace: not UTF-8 text; {REMEDY}") from error
    if not number:
        raise DymoeError(f"{path}: not a trace: it is empty; {REMEDY}")


@dataclass(frozen=True)
class _LayerLine:
    """A line of a layer. `pass` is no name in Python."""

    pass_: Number
    tokens: Number
    layer: Number
    wants: tuple[tuple[Number, Number, Number], ...]
    hits: Number
    read_bytes: Bytes
    look_ahead_bytes: Bytes
    wait_s: Factor
    seconds: Factor
    gates: tuple[float, ...] = ()


@dataclass(frozen=True)
class _PassLine:
    """A line of a whole pass."""

    pass_: Number
    tokens: Number
    seconds: Factor
    point: str
    prompt: bool
    memory_bytes: Bytes | None = None  # older traces lack both
    arena_bytes: Bytes | None = None


def _python_names(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"pass_" if key == "pass" else key: value for key, value in line.items()}


def _fits(line: _LayerLine, bundle: Bundle) -> bool:
    experts = {expert for expert, _, _ in line.wants}
    return (
        line.layer in bundle.manifest.layers
        and len(experts) == len(line.wants)
        and max(experts, default=0) < bundle.spec.num_experts
        and all(tier in bundle.manifest.ladder for _, tier, _ in line.wants)
    )


class Decisions:
    """`TokenTiers` that repeat the tiers of a traced run of the same prompt."""

    by_rule = for_each = False

    def __init__(self, lines: Iterable[Mapping[str, Any]], where: str) -> None:
        """Read the lines of a trace; errors call it `where`."""
        self._where = where
        self._passes: list[Mapping[str, Any]] = []
        self._tiers: dict[tuple[int, int], dict[int, int]] = {}  # (pass, layer) of a single token -> expert -> tier
        for line in lines:
            if "layer" not in line:
                self._passes.append(line)
            elif line["tokens"] == 1:
                self._tiers[line["pass"], line["layer"]] = {expert: tier for expert, tier, _ in line["wants"]}
        self._next = 0  # index of the next pass
        self._left = 0  # tokens of the previous pass that have not run yet

    def begin(self, tokens: int, prompt: bool) -> str:
        """Return the operating point of the trace for the next `tokens`.

        A prompt may be divided into other passes than in the trace. Raises DymoeError if the trace has no matching
        pass.
        """
        while self._left < tokens:
            if self._next == len(self._passes) or self._passes[self._next]["prompt"] != prompt:
                raise self._foreign()
            self._left += self._passes[self._next]["tokens"]
            self._next += 1
        self._left -= tokens
        return str(self._passes[self._next - 1]["point"])

    def choose(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> Chosen:
        chosen = self._tiers.get((self._passes[self._next - 1]["pass"], layer))
        if chosen is None or not chosen.keys() <= set(experts):
            raise self._foreign()
        return Chosen([chosen.get(expert, 0) for expert in experts])

    def _foreign(self) -> DymoeError:
        return DymoeError(
            f"{self._where}: the trace is not of this prompt and these options (pass {self._next}); record a new one"
        )

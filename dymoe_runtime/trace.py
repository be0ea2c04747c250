"""What each layer of each pass wanted, found and waited for, line by line; and the tiers of such a trace again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dymoe_runtime.bundle import Bundle
from dymoe_runtime.decoder import Experts, Routing
from dymoe_runtime.delivery import Want
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.residency import StoreStats
from dymoe_runtime.store import ExpertStore


class Tracer:
    """Writes one JSON object a line: of each layer, then of the pass as a whole.

    A layer has `pass`, `tokens`, `layer`, `wants` ([expert, tier, tokens that use it] each), `gates` of a single
    token, `hits`, `wait_s` and `seconds` of the routed experts, and what reads have begun since the line before,
    `read_bytes`, of these for look-ahead `look_ahead_bytes`; a pass has `pass`, `tokens`, `seconds`, `point` and
    `prompt`, whether it is of one.
    """

    def __init__(self, path: Path, store: ExpertStore) -> None:
        self._path = path
        self._stream = path.open("w", encoding="utf-8")
        self._store = store
        self._pass = 0
        self._wants: Sequence[Want] = ()
        self._before = replace(store.stats)
        store.observer = self._note

    def around(self, experts: Experts) -> Experts:
        """The same experts, traced."""

        def traced(layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
            self._note(())
            started = time.perf_counter()
            y = experts(layer, h, routing)
            seconds = time.perf_counter() - started
            before, now = self._before, replace(self._store.stats)
            line: dict[str, Any] = {"pass": self._pass, "tokens": len(h), "layer": layer}
            line["wants"] = [[key.expert, tier, tokens] for key, tier, tokens in self._wants]
            if len(h) == 1:
                line["gates"] = [round(gate, 6) for gate in routing.gates[0].tolist()]
            for name in ("hits", "read_bytes", "look_ahead_bytes", "wait_s"):
                line[name] = getattr(now, name) - getattr(before, name)
            self._before = now
            self._write(line | {"seconds": seconds})
            return y

        return traced

    def stats_were_reset(self) -> None:
        self._before = StoreStats()

    def passed(self, tokens: int, seconds: float, point: str, prompt: bool) -> None:
        """All layers are done."""
        line = {"pass": self._pass, "tokens": tokens, "seconds": seconds, "point": point, "prompt": prompt}
        self._write(line)
        self._pass += 1

    def close(self) -> None:
        with self._writing():
            self._stream.close()

    def _note(self, wants: Sequence[Want]) -> None:
        self._wants = wants

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
                f"{self._path}: cannot be written ({error.strerror}); free some space, or leave --trace out"
            ) from error


def read_trace(path: Path, bundle: Bundle) -> Iterator[dict[str, Any]]:
    """The lines of a trace of `bundle`, of which there is at least one; DymoeError where it is not one."""
    fits = False
    try:
        with path.open(encoding="utf-8") as lines:
            for text in lines:
                line = json.loads(text)
                fits = _fits(line, bundle)
                if not fits:
                    break
                yield line
    except (ValueError, TypeError, KeyError) as error:
        raise DymoeError(f"{path}: not a trace ({error!r}); make one with dymoe-run --trace") from error
    if not fits:
        raise DymoeError(f"{path}: not a trace of this bundle; make one with dymoe-run --trace")


def _fits(line: Mapping[str, Any], bundle: Bundle) -> bool:
    counts = [line["pass"], line["tokens"]]
    if "layer" in line:
        counts += [line["hits"], line["read_bytes"], line["look_ahead_bytes"]]
        known = line["layer"] in bundle.manifest.layers and line["wait_s"] >= 0
        experts, ladder = range(bundle.spec.num_experts), bundle.manifest.ladder
        if not known or not all(expert in experts and tier in ladder for expert, tier, _ in line["wants"]):
            return False
        counts += [tokens for _, _, tokens in line["wants"]]
    elif not isinstance(line["point"], str) or not isinstance(line["prompt"], bool):
        return False
    return all(isinstance(count, int) and count >= 0 for count in counts) and line["seconds"] >= 0


class Decisions:
    """The tiers that a traced run chose, for a run of the same prompt to choose them again."""

    def __init__(self, lines: Iterable[Mapping[str, Any]], where: str) -> None:
        self._where = where
        self._passes: list[Mapping[str, Any]] = []
        self._tiers: dict[tuple[int, int], dict[int, int]] = {}  # by pass and layer, of single tokens
        for line in lines:
            if "layer" not in line:
                self._passes.append(line)
            elif line["tokens"] == 1:
                self._tiers[line["pass"], line["layer"]] = {expert: tier for expert, tier, _ in line["wants"]}
        self._next = 0  # pass
        self._left = 0  # tokens of the pass before that

    def begin(self, tokens: int, prompt: bool) -> str:
        """The point that the coming tokens ran at; DymoeError where the trace has no such passes.

        A prompt may be divided into other passes than it was.
        """
        while self._left < tokens:
            if self._next == len(self._passes) or self._passes[self._next]["prompt"] != prompt:
                raise self._foreign()
            self._left += self._passes[self._next]["tokens"]
            self._next += 1
        self._left -= tokens
        return str(self._passes[self._next - 1]["point"])

    def tiers(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Of the experts of the token that is decoded; 0 is skipped."""
        chosen = self._tiers.get((self._passes[self._next - 1]["pass"], layer))
        if chosen is None or not chosen.keys() <= set(experts):
            raise self._foreign()
        return [chosen.get(expert, 0) for expert in experts]

    def _foreign(self) -> DymoeError:
        return DymoeError(
            f"{self._where}: the trace is not of this prompt and these options (pass {self._next}); trace them anew"
        )

"""Teacher-forced evaluation: likelihood of a text, and distance to a reference model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dymoe_runtime.budget import SCORED_ROWS, plan_budget
from dymoe_runtime.bundle import MANIFEST, Bundle
from dymoe_runtime.decoder import Decoder
from dymoe_runtime.device import format_size, memory_limit, resident_bytes
from dymoe_runtime.errors import DymoeError, importing
from dymoe_runtime.model import Model
from dymoe_runtime.options import RunOptions, label_of
from dymoe_runtime.policy import TierRule
from dymoe_runtime.spec import ModelSpec


@dataclass
class Score:
    """Sums over tokens; natural logarithms."""

    tokens: int = 0
    nll_sum: float = 0.0
    kl_sum: float = 0.0
    agreed: int = 0
    compared: int = 0

    def add(self, other: Score) -> None:
        self.tokens += other.tokens
        self.nll_sum += other.nll_sum
        self.kl_sum += other.kl_sum
        self.agreed += other.agreed
        self.compared += other.compared

    def to_json(self) -> dict[str, Any]:
        """Per token: nll, perplexity and, against a reference, kl and top1_agreement."""
        nll = self.nll_sum / self.tokens
        if not math.isfinite(nll + self.kl_sum):
            raise DymoeError("the model's output is not finite; its weights may be damaged: run dymoe-bundle verify")
        result: dict[str, Any] = {"tokens": self.tokens, "nll": nll, "perplexity": math.exp(min(nll, 700.0))}
        if self.compared:
            result |= {"kl": self.kl_sum / self.compared, "top1_agreement": self.agreed / self.compared}
        return result


# Logits [rows, vocab] of hidden states [rows, H].
Head = Callable[[np.ndarray], np.ndarray]


def windows(ids: Sequence[int], length: int) -> Iterator[np.ndarray]:
    """Cut `ids` into windows of `length`; each starts anew, and a last one of a single token is left out."""
    for start in range(0, len(ids), length):
        window = np.array(ids[start : start + length])
        if len(window) > 1:
            yield window


@np.errstate(over="ignore", invalid="ignore")  # a score tells what is not finite
def score_window(
    ids: np.ndarray, hidden: np.ndarray, head: Head, reference: tuple[np.ndarray, Head] | None = None
) -> Score:
    """Score the prediction of ids[1:] from hidden states [T, H]; `reference` is (hidden, head) of another model.

    KL is sum p_ref log(p_ref / p) over the vocabulary, at the positions that are scored.
    """
    score = Score()
    for start in range(0, len(ids) - 1, SCORED_ROWS):
        stop = min(start + SCORED_ROWS, len(ids) - 1)
        log_p = log_softmax(head(hidden[start:stop]))
        score.tokens += stop - start
        score.nll_sum -= float(np.take_along_axis(log_p, ids[start + 1 : stop + 1, None], 1).sum(dtype=np.float64))
        if reference is not None:
            log_r = log_softmax(reference[1](reference[0][start:stop]))
            score.kl_sum += float((np.exp(log_r) * (log_r - log_p)).sum(dtype=np.float64))
            score.agreed += int((log_p.argmax(-1) == log_r.argmax(-1)).sum())
            score.compared += stop - start
    return score


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    shifted = logits - logits.max(-1, keepdims=True)
    normed: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normed


class Reference(Protocol):
    """The model to compare with."""

    def hidden(self, ids: np.ndarray) -> np.ndarray: ...

    def logits(self, hidden: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Evaluation:
    """Texts to score, as token ids by file name, in windows of `length`."""

    texts: Mapping[str, Sequence[int]]
    length: int
    prefill: bool = False  # choose tiers by the prefill rule, a window a chunk
    reference: Reference | None = None

    @property
    def windows(self) -> int:
        return sum(1 for ids in self.texts.values() for _ in windows(ids, self.length))


def evaluate(
    model: Model, job: Evaluation, whole_table: bool, advance: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Scores per file of the model's own setting, and with `whole_table` of every uniform tier beside it."""
    rules = {model.point: model.rule}
    if whole_table:
        ladder, layers = model.bundle.manifest.ladder, model.spec.num_layers
        rules = {f"tier {t}": TierRule.uniform(t, ladder, layers) for t in reversed(ladder)} | rules
    rows = {name: _Row() for name in ((ORIGINAL, *rules) if job.reference else rules)}
    for file, ids in job.texts.items():
        for window in windows(ids, job.length):
            _score_rows(model, window, file, job, rules, rows)
            advance()
    return {
        "point": model.point,
        "phase": "prefill" if job.prefill else "decode",
        "files": rows[model.point].to_json()["files"],
        "table": [{"point": name, **row.to_json()} for name, row in rows.items()],
    }


ORIGINAL = "reference"


class _Row:
    """Scores of one setting by file, and the tiers that it used."""

    def __init__(self) -> None:
        self.scores: dict[str, Score] = {}
        self.used: dict[int, int] = {}

    def to_json(self) -> dict[str, Any]:
        pairs = sum(self.used.values())
        bits = sum(tier * count for tier, count in self.used.items()) / pairs if pairs else None
        files = [{"file": file, **score.to_json()} for file, score in self.scores.items()]
        return {"bits_mean": bits, "files": files}


def _score_rows(
    model: Model,
    ids: np.ndarray,
    file: str,
    job: Evaluation,
    rules: Mapping[str, TierRule],
    rows: Mapping[str, _Row],
) -> None:
    """Add one window to every row."""
    reference = None
    if job.reference is not None:
        reference = (job.reference.hidden(ids), job.reference.logits)
        rows[ORIGINAL].scores.setdefault(file, Score()).add(score_window(ids, *reference))
    for name, rule in rules.items():
        model.experts.rule = rule
        model.experts.stats.used.clear()
        hidden = model.hidden(ids, weigh_tokens=job.prefill)
        rows[name].scores.setdefault(file, Score()).add(score_window(ids, hidden, model.decoder.logits, reference))
        for tier, count in model.experts.stats.used.items():
            rows[name].used[tier] = rows[name].used.get(tier, 0) + count


class DecoderReference:
    """A decoder as the reference."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.logits = decoder.logits

    def hidden(self, ids: np.ndarray) -> np.ndarray:
        return self._decoder.forward(ids)


class Beside(NamedTuple):
    """A reference, how many bytes are left for a model beside it, and how many of the process's it holds now."""

    reference: Reference
    left_bytes: int
    held_bytes: int


@contextmanager
def open_reference(path: Path, spec: ModelSpec, window: int, memory: int | None) -> Iterator[Beside]:
    """A bundle at its highest tier, or a checkpoint through an entry point of the group `dymoe.references`.

    For windows of so many tokens. A bundle leaves `memory` bytes to the model, by default about half of what there
    is; what a checkpoint will take is not known.
    """
    with ExitStack() as stack:
        limit, before = memory_limit(), resident_bytes()
        if (path / MANIFEST).exists():
            with importing():  # what it attends with, before memory is divided
                import dymoe_runtime.attention  # noqa: F401
            bundle = Bundle.open(path)
            model = stack.enter_context(Model(bundle, _options_of_reference(bundle, window, limit, memory), window))
            decoder = model.decoder
            limit -= max(0, model.budget.memory - resident_bytes())  # what it has not taken yet
        else:
            decoder = _open_checkpoint(path)
        if decoder.spec.vocab_size != spec.vocab_size:
            raise DymoeError(
                f"{path}: its vocabulary has {decoder.spec.vocab_size} tokens, the bundle's {spec.vocab_size}; "
                "give the model that the bundle was compiled from"
            )
        held = max(0, resident_bytes() - before)
        yield Beside(DecoderReference(decoder), limit - held, held)


def _options_of_reference(bundle: Bundle, window: int, limit: int, memory: int | None) -> RunOptions:
    """Within a memory limit; DymoeError where that is too little, or what is left beside `memory`."""
    least = plan_budget(bundle, window, limit, window=window).floor
    both = limit + resident_bytes()  # for the process itself is in the budgets of both
    left = min(limit, max(both // 2, least) if memory is None else both - memory)
    if left < least:
        beside = "" if memory is None else f" beside --memory {format_size(memory)}"
        raise DymoeError(
            f"{bundle.path}: as the reference it needs {format_size(least)}, and there are {format_size(max(0, left))}"
            f"{beside}; give it less to score at once with --context, or more memory"
        )
    return RunOptions(tier=bundle.manifest.ladder[-1], memory_bytes=left)


def _open_checkpoint(path: Path) -> Decoder:
    from importlib import metadata  # which takes a moment

    for entry in metadata.entry_points(group="dymoe.references"):
        decoder: Decoder = entry.load()(path)
        return decoder
    raise DymoeError(
        f"{path}: not a bundle, and reading checkpoints needs dymoe_compile; install the whole dymoe package"
    )


def format_table(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` as text, a block per file."""
    blocks = []
    for index, first in enumerate(result["files"]):
        lines = [f"{first['file']}: {first['tokens']} tokens scored, by the {result['phase']} rule"]
        lines.append(f"  {'':<12}{'bits':>6}{'nll':>9}{'perplexity':>12}{'kl':>10}{'top-1':>8}")
        for row in result["table"]:
            lines.append(_format_row(row["point"], row["bits_mean"], row["files"][index]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _format_row(name: str, bits: float | None, score: Mapping[str, Any]) -> str:
    label = name if name == ORIGINAL else label_of(name)
    shown = "" if bits is None else f"{bits:.2f}"
    line = f"  {label:<12}{shown:>6}{score['nll']:>9.4f}{score['perplexity']:>12.3f}"
    if "kl" in score:
        line += f"{score['kl']:>10.5f}{score['top1_agreement']:>8.1%}"
    return line

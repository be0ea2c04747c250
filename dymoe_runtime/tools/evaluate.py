"""Teacher-forced evaluation: likelihood of a text, and distance to a reference model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.load import load_scorer
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.engine.model import Scorer
from dymoe_runtime.engine.options import RunOptions, label_of
from dymoe_runtime.errors import DymoeError, needing_extra
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.score import Score, WindowModel, score_blocks, windows
from dymoe_runtime.model.tier_counts import TierCounts
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.process import memory_limit, resident_bytes
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.storage import MANIFEST
from dymoe_runtime.tools.intervals import CONFIDENCE, intervals, total
from dymoe_runtime.units import format_size

ORIGINAL = "reference"
# The longest windows in which `distances` scores texts.
MAX_WINDOW = 2048
# Module and function that open checkpoints. They belong to the compiler, which a runtime may be installed without.
OPEN_CHECKPOINT = ("dymoe_compile.checkpoint.original", "open_original")

# Columns of a table: key of a figure, its format, its width, and the width of half of its interval.
COLUMNS = (("nll", ".4f", 9, 8), ("perplexity", ".3f", 12, 9), ("kl", ".5f", 10, 9), ("top1_agreement", ".1%", 8, 6))


@dataclass(frozen=True)
class Evaluation:
    """Texts to score, as token ids by file name, in windows of at most `length` tokens."""

    texts: Mapping[str, Sequence[int]]
    length: int
    by_prefill: bool = False  # choose tiers by the prefill rule, each window as one chunk of a prompt
    reference: WindowModel | None = None

    @property
    def windows(self) -> int:
        """Return the number of windows in all texts."""
        return sum(1 for ids in self.texts.values() for _ in windows(ids, self.length))


def evaluate(
    scorer: Scorer, job: Evaluation, whole_table: bool, advance: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Return the scores per file of the scorer's own setting; `advance` is called once per window.

    With `whole_table` every uniform tier is scored as well. With a reference in `job` the scores include KL to it, and
    the reference itself gets a row.
    """
    own = scorer.point
    rules = {own: scorer.rule}
    if whole_table:
        ladder, layers = scorer.bundle.manifest.ladder, scorer.spec.num_layers
        rules = {f"tier {t}": TierRule.uniform(t, ladder, layers) for t in reversed(ladder)} | rules
    rows = {name: _Row() for name in ((ORIGINAL, *rules) if job.reference else rules)}
    for file, ids in job.texts.items():
        for window in windows(ids, job.length):
            _score_rows(scorer, window, file, job, rules, rows)
            advance()
    return {
        "point": own,
        "phase": "prefill" if job.by_prefill else "decode",
        "files": rows[own].to_json()["files"],
        "table": [{"point": name, **row.to_json()} for name, row in rows.items()],
    }


@dataclass
class _Row:
    """Scores of one setting by file, and counts of the tiers that it used."""

    blocks: dict[str, list[Score]] = field(default_factory=dict)
    counts: TierCounts = field(default_factory=TierCounts)

    def add(self, file: str, blocks: Sequence[Score]) -> None:
        """Add the scores of the blocks of one window of a file."""
        self.blocks.setdefault(file, []).extend(blocks)

    def to_json(self) -> dict[str, Any]:
        """Return the mean bits, None if no expert ran, and the scores of each file with their intervals."""
        bits = self.counts.bits_mean if self.counts.used else None
        files = []
        for file, blocks in self.blocks.items():
            files.append({"file": file, **total(blocks).to_json(), **intervals(blocks)})
        return {"bits_mean": bits, "files": files}


def _score_rows(
    scorer: Scorer,
    ids: np.ndarray,
    file: str,
    job: Evaluation,
    rules: Mapping[str, TierRule],
    rows: Mapping[str, _Row],
) -> None:
    """Score one window with every setting, and add the scores to `rows`."""
    reference = None
    if job.reference is not None:
        reference = (job.reference.hidden(ids), job.reference.logits)
        rows[ORIGINAL].add(file, score_blocks(ids, *reference))
    for name, rule in rules.items():
        scorer.use(name, rule)
        scorer.counts.clear()
        hidden = scorer.hidden(ids, job.by_prefill)
        rows[name].add(file, score_blocks(ids, hidden, scorer.logits, reference))
        rows[name].counts.add_all(scorer.counts)


def distances(
    bundle: Bundle,
    kernels: Kernels,
    point: str,
    texts: Mapping[str, Sequence[int]],
    reference: Path,
    memory_bytes: int | None,
) -> list[dict[str, Any]]:
    """Return the scores of each text of token ids at `point`, among them the KL to a checkpoint or bundle.

    Texts are scored in windows of at most MAX_WINDOW tokens. Raises DymoeError as `open_reference` and `load_scorer`
    do.
    """
    length = min(MAX_WINDOW, bundle.spec.max_context)
    window = min(length, max(map(len, texts.values())))
    with ExitStack() as stack:
        beside = stack.enter_context(open_reference(reference, bundle.spec, kernels, window, memory_bytes))
        memory = min(beside.left_bytes, memory_bytes or beside.left_bytes)
        options = RunOptions(point=point, memory_bytes=memory, uncounted_bytes=beside.held_bytes, context=length)
        scorer = stack.enter_context(load_scorer(bundle, options, window, kernels))
        files = evaluate(scorer, Evaluation(texts, length, reference=beside.reference), False)["files"]
    return [dict(scores) for scores in files]


class Beside(NamedTuple):
    """A reference, the bytes left for the model to compare, and the bytes of this process the reference holds now."""

    reference: WindowModel
    left_bytes: int
    held_bytes: int


@contextmanager
def open_reference(
    path: Path, spec: ModelSpec, kernels: Kernels, window: int, memory_bytes: int | None
) -> Iterator[Beside]:
    """Open a bundle, run at its highest tier, or a checkpoint, to score windows of up to `window` tokens.

    A bundle leaves `memory_bytes` to the model that is compared with it, by default about half of the memory. The
    memory that a checkpoint will take is not known. Raises DymoeError if the reference has another vocabulary size than
    `spec`, or if a bundle does not get the memory that it needs.
    """
    with ExitStack() as stack:
        limit, before = memory_limit(), resident_bytes()
        if path.is_file() or (path / MANIFEST).exists():
            bundle = Bundle.open(path)
            options = _options_of_reference(bundle, kernels, window, limit, memory_bytes)
            scorer = stack.enter_context(load_scorer(bundle, options, window, kernels))
            reference: WindowModel = scorer
            limit -= max(0, scorer.budget.memory_bytes - resident_bytes())  # budgeted, not yet resident
        else:
            reference = open_checkpoint(path, kernels)
        if reference.spec.vocab_size != spec.vocab_size:
            raise DymoeError(
                f"{path}: its vocabulary has {reference.spec.vocab_size} tokens, the bundle's {spec.vocab_size}; "
                "give the model that the bundle was compiled from"
            )
        held = max(0, resident_bytes() - before)
        yield Beside(reference, limit - held, held)


def _options_of_reference(
    bundle: Bundle, kernels: Kernels, window: int, limit: int, memory_bytes: int | None
) -> RunOptions:
    """Return the options of a reference bundle that fits `limit` bytes.

    Raises DymoeError if `limit`, or what `memory_bytes` leaves of it, is too little.
    """
    floor = plan_budget(bundle, kernels, window, limit, window=window, kv_bits=32).floor_bytes
    both = limit + resident_bytes()  # because both budgets count the process itself
    left = min(limit, max(both // 2, floor) if memory_bytes is None else both - memory_bytes)
    if left < floor:
        beside = "" if memory_bytes is None else f" beside --memory {format_size(memory_bytes)}"
        raise DymoeError(
            f"{bundle.path}: as the reference it needs {format_size(floor)}, "
            f"but only {format_size(max(0, left))} are left{beside}; "
            "score less at once with --context, or give more memory"
        )
    return RunOptions(tier=bundle.manifest.ladder[-1], memory_bytes=left, kv_bits=32, preload=False, context=window)


def open_checkpoint(path: Path, kernels: Kernels) -> WindowModel:
    """Open a checkpoint directory in float32; raise DymoeError if it is not complete, or the compiler is missing."""
    module, name = OPEN_CHECKPOINT
    with needing_extra("compile", "reading checkpoints"):
        opener: Callable[[Path, Kernels], WindowModel] = getattr(importlib.import_module(module), name)
    return opener(path, kernels)


def format_table(result: Mapping[str, Any]) -> str:
    """Return the result of `evaluate` as text, one block per file, with half of each interval after its figure."""
    blocks = []
    for index, first in enumerate(result["files"]):
        known = first["nll_interval"] is not None
        shown = f"± half of the {CONFIDENCE:.0%} interval" if known else f"too few for {CONFIDENCE:.0%} intervals"
        lines = [f"{first['file']}: {first['tokens']} tokens scored, by the {result['phase']} rule; {shown}"]
        lines.append(f"  {'':<12}{'bits':>6}{'nll':>9}{'':8}{'perplexity':>12}{'':9}{'kl':>10}{'':9}{'top-1':>8}")
        for row in result["table"]:
            lines.append(_format_row(row["point"], row["bits_mean"], row["files"][index]))
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def _format_row(name: str, bits: float | None, score: Mapping[str, Any]) -> str:
    label = name if name == ORIGINAL else label_of(name)
    line = f"  {label:<12}{'' if bits is None else f'{bits:.2f}':>6}"
    for key, form, width, more in COLUMNS:
        if key in score:
            interval = score[f"{key}_interval"]
            half = "" if interval is None else f"±{(interval[1] - interval[0]) / 2:{form}}"
            line += f"{score[key]:>{width}{form}}{f' {half}':<{more}}"
    return line

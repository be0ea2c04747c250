"""The whole pipeline: read, calibrate, quantize, measure, allocate, write."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dymoe_runtime
from dymoe_compile.allocate import layer_choices, solve
from dymoe_compile.calibration import LayerStatistics, Windows, layer_statistics, load_texts, make_windows
from dymoe_compile.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.quantize import quantize_expert, quantize_matrix
from dymoe_compile.sensitivity import Measurement, Measurer, Original
from dymoe_compile.writer import BundleWriter, check_space, explaining_full_disk
from dymoe_runtime import kernels
from dymoe_runtime.bundle import (
    DENSE,
    POLICY,
    TOKENIZER,
    TOKENIZER_EXTRAS,
    VERSION,
    Bundle,
    FileEntry,
    LayerEntry,
    Manifest,
    dense_layout,
    expert_layout,
    file_entry,
    is_quantized,
    layer_file,
    read_manifest,
)
from dymoe_runtime.decoder import ACTIVATIONS, Decoder, Routing
from dymoe_runtime.device import Profile, default_threads, format_size
from dymoe_runtime.errors import BudgetError, DymoeError, QualityError
from dymoe_runtime.model import plan_budget
from dymoe_runtime.policy import LayerPolicy, OperatingPoint, Policy, TierRule
from dymoe_runtime.spec import ExpertKey, ModelSpec
from dymoe_runtime.text import Tokenizer
from dymoe_runtime.tiers import pack_record

# Held-out tokens for the many runs that sensitivity takes; operating points use all of them.
SENSITIVITY_TOKENS = 2048
# Mean bits that mixed operating points aim at, between the tiers of the ladder.
POINT_STEP = 0.25
# Context for which the profile's memory is checked.
PROFILE_CONTEXT = 2048
# What a process holds before it loads anything, for checking a profile elsewhere than on the device.
PROCESS_BYTES = 320 << 20

Advance = Callable[[], object]
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class CompileOptions:
    model: Path
    output: Path
    profile: Profile
    ladder: tuple[int, ...]
    dense_bits: int
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 16384
    seed: int = 0
    jobs: int | None = None
    fresh: bool = False
    max_kl: float | None = None


@contextlib.contextmanager
def silent(title: str, total: int) -> Iterator[Advance]:
    """No progress bar."""
    yield lambda: None


def compile_bundle(options: CompileOptions, progress: Progress = silent) -> tuple[Bundle, bool]:
    """Compile `options.model` to the bundle `options.output`; the bundle, and whether anything had to be done."""
    torch.set_num_threads(options.jobs or default_threads())
    kernels.set_threads(options.jobs or default_threads())
    check_output(options.output)
    checkpoint = Checkpoint.open(options.model)
    tokenizer = Tokenizer.load(options.model)
    windows = make_windows(
        load_texts(options.calibration),
        tokenizer.encode,
        checkpoint.spec.max_context,
        options.calibration_tokens,
        options.seed,
    )
    check_vocabulary(windows, checkpoint.spec)
    provenance = describe(options, checkpoint, windows, progress)
    bundle = None if options.fresh else up_to_date(options.output, provenance)
    if bundle is None:
        bundle = build(options, checkpoint, windows, provenance, progress)
        changed = True
    else:
        changed = False
    check_quality(bundle, options)
    return bundle, changed


@torch.inference_mode()
def build(
    options: CompileOptions, checkpoint: Checkpoint, windows: Windows, provenance: dict[str, Any], progress: Progress
) -> Bundle:
    """Write the bundle; a run that was interrupted goes on with its last whole layer."""
    needed = bundle_bytes(checkpoint.spec, options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        explaining_full_disk(options.output, needed),
        contextlib.closing(BundleWriter(options.output, provenance, options.fresh)) as writer,
    ):
        check_space(writer.directory, needed - directory_bytes(writer.directory))
        copy_tokenizer(options.model, writer)
        dense_crc32 = write_dense(checkpoint, options.dense_bits, writer, progress)
        original, statistics, layers = calibrate(checkpoint, windows, options, writer, progress)
        manifest = make_manifest(checkpoint.spec, options, writer.directory, dense_crc32, layers, provenance)
        draft = Bundle(writer.directory, manifest, Policy(options.ladder, (), (), ""))
        policy = fit_policy(draft, windows, original, statistics, options, progress)
        check_quality(Bundle(writer.directory, manifest, policy), options)
        writer.write_small(POLICY, (json.dumps(policy.to_json(), indent=1) + "\n").encode())
        writer.finish(make_manifest(checkpoint.spec, options, writer.directory, dense_crc32, layers, provenance))
    return Bundle.open(options.output)


def check_output(output: Path) -> None:
    """DymoeError where writing to `output` would destroy something that is not a bundle."""
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / "manifest.json").exists()):
        raise DymoeError(f"{output}: exists and is not a bundle; choose another place with -o")


def check_vocabulary(windows: Windows, spec: ModelSpec) -> None:
    largest = int(max(windows.train.max(), windows.held_out.max()))
    if largest >= spec.vocab_size:
        raise DymoeError(
            f"tokenizer.json: gives token {largest}, the model knows {spec.vocab_size}; "
            "use the tokenizer that belongs to the checkpoint"
        )


def describe(options: CompileOptions, checkpoint: Checkpoint, windows: Windows, progress: Progress) -> dict[str, Any]:
    """Provenance: all that decides the bytes of the bundle."""
    tokenizer = hashlib.sha256()
    for name in (TOKENIZER, *TOKENIZER_EXTRAS):
        if (options.model / name).exists():
            tokenizer.update(name.encode() + (options.model / name).read_bytes())
    return {
        "dymoe_version": dymoe_runtime.__version__,
        "format_version": VERSION,
        "source_sha256": _source_digest(checkpoint, progress),
        "tokenizer_sha256": tokenizer.hexdigest(),
        "calibration_sha256": windows.digest,
        "calibration_tokens": windows.train.numel(),
        "held_out_tokens": windows.held_out.numel(),
        "calibration_token_limit": options.calibration_tokens,
        "ladder": list(options.ladder),
        "dense_bits": options.dense_bits,
        "seed": options.seed,
        "profile": {**asdict(options.profile), "ladder": list(options.profile.ladder)},
    }


def up_to_date(output: Path, provenance: dict[str, Any]) -> Bundle | None:
    """The bundle at `output` if it is whole and made from the same things."""
    try:
        if read_manifest(output).provenance == provenance:
            return Bundle.open(output)
    except DymoeError:
        pass
    return None


def bundle_bytes(spec: ModelSpec, options: CompileOptions) -> int:
    """About what the bundle and the state of an interrupted run take on the disk."""
    dense = sum(int(np.prod(shape)) for shape in spec.tensor_shapes().values()) * min(options.dense_bits + 1, 16) // 8
    records = len(spec.moe_layers) * spec.num_experts * expert_layout(spec, options.ladder).record_bytes
    state = 2 * 4 * options.calibration_tokens * spec.hidden_size
    return dense + records + state + (1 << 20)


def directory_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def copy_tokenizer(model: Path, writer: BundleWriter) -> None:
    for name in (TOKENIZER, *TOKENIZER_EXTRAS):
        if (model / name).exists():
            writer.write_small(name, (model / name).read_bytes())


def write_dense(checkpoint: Checkpoint, bits: int, writer: BundleWriter, progress: Progress) -> dict[str, int]:
    """Quantize and write what is outside the experts; the checksum of each tensor."""
    if done := writer.load_state("dense"):
        return dict(done[1])
    shapes = checkpoint.spec.tensor_shapes()
    stored = {name: _dense_storage(name, shape, bits) for name, shape in shapes.items()}
    with progress("dense weights", len(shapes)) as advance:

        def tensors() -> Iterator[torch.Tensor]:
            for name, shape in shapes.items():
                yield _dense_tensor(checkpoint.tensor(name), name, shape, bits)
                advance()

        checksums = writer.write_dense(stored, tensors())
    writer.save_state("dense", {}, checksums)
    return checksums


def calibrate(
    checkpoint: Checkpoint, windows: Windows, options: CompileOptions, writer: BundleWriter, progress: Progress
) -> tuple[Original, dict[int, LayerStatistics], dict[int, LayerEntry]]:
    """Run all windows through the original model, a layer at a time, quantizing each layer's experts on the way."""
    spec = checkpoint.spec
    run = _LayerRun(checkpoint, windows, options, writer)
    statistics, layers, start, x = run.resume()
    with progress("experts", len(spec.moe_layers) * spec.num_experts) as advance:
        for _ in range(len(layers) * spec.num_experts):
            advance()
        for layer in range(start, spec.num_layers):
            x = run.layer(layer, x, statistics, layers, advance)
    held_out = x[windows.train.numel() :].split(windows.held_out.shape[1])
    return Original(held_out, run.decoder.logits), statistics, layers


def fit_policy(
    bundle: Bundle,
    windows: Windows,
    original: Original,
    statistics: dict[int, LayerStatistics],
    options: CompileOptions,
    progress: Progress,
) -> Policy:
    """Measure sensitivities, solve for thresholds, measure the candidates, keep those that are best at their size."""
    few = max(1, SENSITIVITY_TOKENS // windows.held_out.shape[1])
    excerpt = Original(original.hidden[:few], original.head)
    sensitivity = measure_sensitivity(bundle, windows.held_out[:few], excerpt, progress)
    rules = candidates(bundle, statistics, sensitivity)
    measurer = Measurer(bundle, windows.held_out, original)
    with progress("operating points", bundle.spec.num_layers) as advance:
        measured = measurer.measure(list(rules.values()), advance)
    points = [
        make_point(name, rule, result, bundle) for (name, rule), result in zip(rules.items(), measured, strict=True)
    ]
    kept = best_points(points)
    notes = () if any(point.kind == "mixed" for point in kept) else ("importance is flat: uniform tiers win everywhere",)
    return Policy(
        ladder=options.ladder,
        layers=tuple(layer_policy(layer, statistics, sensitivity) for layer in range(bundle.spec.num_layers)),
        points=tuple(kept),
        default_point=default_point(kept, bundle, options.profile).name,
        notes=notes,
    )


def measure_sensitivity(
    bundle: Bundle, held_out: torch.Tensor, original: Original, progress: Progress
) -> dict[int, dict[int, float]]:
    """layer -> tier -> KL of the model with only that layer at that tier and all others at the highest."""
    ladder, layers = bundle.manifest.ladder, bundle.spec.num_layers
    top = TierRule.uniform(ladder[-1], ladder, layers)
    cases = [(layer, tier) for layer in bundle.spec.moe_layers for tier in ladder]
    rules = [_with_layer(top, layer, TierRule.uniform(tier, ladder, layers)) for layer, tier in cases]
    with progress("sensitivity", layers) as advance:
        results = Measurer(bundle, held_out, original).measure(rules, advance)
    table: dict[int, dict[int, float]] = {layer: {} for layer in bundle.spec.moe_layers}
    for (layer, tier), result in zip(cases, results, strict=True):
        table[layer][tier] = result.score.kl_sum / result.score.compared
    return table


def candidates(
    bundle: Bundle, statistics: dict[int, LayerStatistics], sensitivity: dict[int, dict[int, float]]
) -> dict[str, TierRule]:
    """Uniform rules, and a mixed rule for each mean number of bits between the lowest and the highest tier."""
    ladder, layers = bundle.manifest.ladder, bundle.spec.num_layers
    rules = {f"uniform-{tier}": TierRule.uniform(tier, ladder, layers) for tier in ladder}
    added = {layer: {t: max(kl - row[ladder[-1]], 0.0) for t, kl in row.items()} for layer, row in sensitivity.items()}
    decode, prefill = [], []
    for layer in bundle.spec.moe_layers:
        seen = statistics[layer]
        decode.append(layer_choices(seen.gates, seen.gates.square(), added[layer], ladder))
        prefill.append(layer_choices(seen.chunk_importance, seen.chunk_energy, added[layer], ladder))
    count = round((ladder[-1] - ladder[0]) / POINT_STEP)
    for bits in (ladder[0] + POINT_STEP * i for i in range(1, count)):
        rule = rules[f"uniform-{ladder[-1]}"]
        chosen = zip(bundle.spec.moe_layers, solve(decode, bits), solve(prefill, bits), strict=True)
        for layer, for_token, for_chunk in chosen:
            row = TierRule(ladder, (for_token.thresholds,) * layers, (for_chunk.thresholds,) * layers)
            rule = _with_layer(rule, layer, row)
        rules[f"{bits:g}"] = rule
    return rules


def make_point(name: str, rule: TierRule, result: Measurement, bundle: Bundle) -> OperatingPoint:
    """An operating point with its measured quality and size; figures rounded to what is meaningful."""
    layout, score = bundle.layout, result.score.to_json()
    pairs = sum(result.used.values())
    active = len(bundle.spec.moe_layers) * bundle.spec.top_k

    def mean(value: Callable[[int], float]) -> float:
        return sum(value(tier) * count for tier, count in result.used.items()) / pairs

    return OperatingPoint(
        name=name,
        kind="uniform" if name.startswith("uniform") else "mixed",
        decode=rule.decode,
        prefill=rule.prefill,
        bits_mean=round(mean(float), 4),
        effective_bits=round(mean(layout.bits_per_weight), 4),
        bytes_per_token=round(mean(layout.prefix_bytes) * active),
        kl=_significant(score["kl"]),
        nll=_significant(score["nll"], 6),
        top1_agreement=_significant(score["top1_agreement"]),
    )


def best_points(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """Uniform points, and mixed ones that nothing of their size or smaller equals; by rising bits."""

    def beaten(point: OperatingPoint) -> bool:
        return any(
            other is not point and other.bytes_per_token <= point.bytes_per_token and other.kl <= point.kl
            for other in points
        )

    kept = [point for point in points if point.kind == "uniform" or not beaten(point)]
    return sorted(kept, key=lambda point: (point.bytes_per_token, point.kl))


def default_point(points: Sequence[OperatingPoint], bundle: Bundle, profile: Profile) -> OperatingPoint:
    """The best mixed point whose experts fit the profile's memory, else the one nearest 3 bits; uniform if none is mixed."""
    mixed = [point for point in points if point.kind == "mixed"] or list(points)
    whole = max(point.effective_bits for point in points)
    room = profile.memory_bytes - PROCESS_BYTES - bundle.manifest.files[DENSE].nbytes
    fitting = [point for point in mixed if bundle.expert_bytes() * point.effective_bits / whole <= room]
    if fitting:
        return min(fitting, key=lambda point: point.kl)
    return min(mixed, key=lambda point: abs(point.bits_mean - 3))


def layer_policy(
    layer: int, statistics: dict[int, LayerStatistics], sensitivity: dict[int, dict[int, float]]
) -> LayerPolicy:
    if layer not in statistics:
        return LayerPolicy(layer, {}, (), (), ())
    seen = statistics[layer]
    return LayerPolicy(
        layer=layer,
        sensitivity={str(tier): _significant(kl) for tier, kl in sensitivity[layer].items()},
        frequency=tuple(seen.frequency),
        gate_mass=tuple(seen.gate_mass),
        look_ahead_recall=tuple(seen.recall),
    )


def check_quality(bundle: Bundle, options: CompileOptions) -> None:
    """BudgetError if the profile's device cannot run the bundle; QualityError if no point reaches --max-kl."""
    context = min(PROFILE_CONTEXT, bundle.spec.max_context)
    floor = plan_budget(bundle, context, fixed=PROCESS_BYTES).floor
    if floor > options.profile.memory_bytes:
        raise BudgetError(
            f"profile {options.profile.name}: {format_size(options.profile.memory_bytes)} of memory are too little, "
            f"this bundle needs at least {format_size(floor)}; choose a larger profile or fewer --dense-bits"
        )
    best = min(point.kl for point in bundle.policy.points)
    if options.max_kl is not None and best > options.max_kl:
        raise QualityError(
            f"no operating point reaches a KL of {options.max_kl:g}, the best has {best:g}; "
            "add a higher tier to --tiers or raise --max-kl"
        )


def make_manifest(
    spec: ModelSpec,
    options: CompileOptions,
    directory: Path,
    dense_crc32: dict[str, int],
    layers: dict[int, LayerEntry],
    provenance: dict[str, Any],
) -> Manifest:
    small = {POLICY, TOKENIZER, *TOKENIZER_EXTRAS}
    files: dict[str, FileEntry] = {
        path.name: file_entry(path, digest=path.name in small)
        for path in sorted(directory.iterdir())
        if path.name in small or path.suffix == ".safetensors"
    }
    return Manifest(spec, options.ladder, options.dense_bits, files, dense_crc32, layers, provenance)


class _LayerRun:
    """One pass of the calibration windows through the original model, resumable after each layer.

    Hidden states [T, H] hold the tokens of the training windows first, then the held-out ones.
    """

    def __init__(
        self, checkpoint: Checkpoint, windows: Windows, options: CompileOptions, writer: BundleWriter
    ) -> None:
        self.spec = checkpoint.spec
        self.decoder = Decoder(checkpoint.spec, CheckpointDense(checkpoint), self._experts)
        self._checkpoint = checkpoint
        self._options = options
        self._writer = writer
        self._ids = torch.cat([windows.train, windows.held_out])
        self._train = len(windows.train)
        self._layout = expert_layout(checkpoint.spec, options.ladder)
        self._activation = ACTIVATIONS[checkpoint.spec.activation]
        self._advance: Advance = lambda: None
        self._routing: Routing | None = None
        self._entry: LayerEntry | None = None
        self._guess: torch.Tensor | None = None  # [T, k], made at the previous layer

    def resume(self) -> tuple[dict[int, LayerStatistics], dict[int, LayerEntry], int, torch.Tensor]:
        """Statistics, files, next layer and hidden states of an interrupted run, or of a fresh one."""
        statistics: dict[int, LayerStatistics] = {}
        layers: dict[int, LayerEntry] = {}
        for layer in reversed(range(self.spec.num_layers)):
            hidden = self._writer.load_state(f"hidden-{layer}")
            if hidden is not None:
                for done in self.spec.moe_layers:
                    if done <= layer:
                        statistics[done], layers[done] = self._load(done)
                self._guess = hidden[0].get("guess")
                return statistics, layers, layer + 1, hidden[0]["x"]
        return statistics, layers, 0, self.decoder.dense.embed(self._ids.reshape(-1))

    def layer(
        self,
        layer: int,
        x: torch.Tensor,
        statistics: dict[int, LayerStatistics],
        layers: dict[int, LayerEntry],
        advance: Advance,
    ) -> torch.Tensor:
        """Hidden states after `layer`, whose experts are written and whose statistics are noted."""
        self._advance = advance
        attended = [self.decoder.attend(layer, window, None, True) for window in x.split(self._ids.shape[1])]
        weights = torch.cat([weight for _, weight in attended if weight is not None])
        x = self.decoder.feed_forward(layer, torch.cat([window for window, _ in attended]), weights)
        if layer not in self.spec.dense_layers:
            statistics[layer], layers[layer] = self._note(layer)
        self._guess = self._next_guess(layer)
        state = {"x": x} if self._guess is None else {"x": x, "guess": self._guess}
        self._writer.save_state(f"hidden-{layer}", state, {})
        self._writer.drop_state(f"hidden-{layer - 1}")
        return x

    def _experts(self, layer: int, h: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The experts seam while compiling: computes in full precision, quantizes and writes each expert."""
        y = torch.zeros_like(h)
        records = (self._expert(ExpertKey(layer, e), h, routing, y) for e in range(self.spec.num_experts))
        index = self.spec.moe_layers.index(layer)
        self._entry = self._writer.write_layer(index, layer, self._layout, records, self.spec.num_experts)
        self._routing = routing
        return y

    def _expert(self, key: ExpertKey, h: torch.Tensor, routing: Routing, y: torch.Tensor) -> np.ndarray:
        """Add one expert's output to y; its record."""
        weights = {name: matrix.float() for name, matrix in self._checkpoint.expert(key).items()}
        tokens, ranks = (routing.experts == key.expert).nonzero(as_tuple=True)
        x, gates = h[tokens], routing.gates[tokens, ranks, None]
        middle = self._activation(x @ weights["gate"].T) * (x @ weights["up"].T)
        y.index_add_(0, tokens, middle @ weights["down"].T * gates)
        self._advance()
        return pack_record(self._layout, quantize_expert(weights, self._options.ladder, _importance(x, middle, gates)))

    def _note(self, layer: int) -> tuple[LayerStatistics, LayerEntry]:
        assert self._routing is not None and self._entry is not None and self._routing.token_weights is not None
        tokens = self._train * self._ids.shape[1]
        routing = Routing(
            self._routing.experts[:tokens],
            self._routing.gates[:tokens],
            self._routing.residual[:tokens],
            self._routing.token_weights[:tokens],
        )
        guess = None if self._guess is None else self._guess[:tokens]
        seen = layer_statistics(routing, self._train, self.spec.num_experts, guess, self._options.seed)
        tensors = {name: value for name, value in vars(seen).items() if isinstance(value, torch.Tensor)}
        values = {name: value for name, value in vars(seen).items() if not isinstance(value, torch.Tensor)}
        self._writer.save_state(f"layer-{layer}", tensors, {"statistics": values, "entry": asdict(self._entry)})
        return seen, self._entry

    def _load(self, layer: int) -> tuple[LayerStatistics, LayerEntry]:
        state = self._writer.load_state(f"layer-{layer}")
        assert state is not None
        tensors, values = state
        entry = values["entry"]
        entry["crc32"] = tuple(tuple(row) for row in entry["crc32"])
        return LayerStatistics(**values["statistics"], **tensors), LayerEntry(**entry)

    def _next_guess(self, layer: int) -> torch.Tensor | None:
        """What this layer's residual stream makes the next layer's router choose."""
        if layer + 1 not in self.spec.moe_layers or layer in self.spec.dense_layers:
            return None
        assert self._routing is not None
        return self.decoder.look_ahead(layer + 1, self._routing.residual)[0]


def _importance(x: torch.Tensor, middle: torch.Tensor, gates: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gate-weighted mean square of what multiplies each column; empty where too few tokens came by to tell."""
    if len(x) < x.shape[1]:
        return {}
    into, inside = (gates * x.square()).mean(0), (gates * middle.square()).mean(0)
    return {"gate": into, "up": into, "down": inside}


def _dense_storage(name: str, shape: tuple[int, ...], bits: int) -> tuple[torch.dtype, tuple[int, ...]]:
    if is_quantized(name, shape, bits):
        return torch.uint8, (dense_layout(shape, bits).record_bytes,)
    matrix = len(shape) == 2 and not name.endswith(".router")
    return (torch.bfloat16 if matrix else torch.float32), shape


def _dense_tensor(tensor: torch.Tensor, name: str, shape: tuple[int, ...], bits: int) -> torch.Tensor:
    if is_quantized(name, shape, bits):
        record = pack_record(dense_layout(shape, bits), {"weight": quantize_matrix(tensor, (bits,))})
        return torch.from_numpy(record)
    return tensor.to(_dense_storage(name, shape, bits)[0])


def _with_layer(rule: TierRule, layer: int, other: TierRule) -> TierRule:
    """`rule` with the thresholds of `other` in one layer."""

    def swap(rows: tuple[Any, ...], row: Any) -> tuple[Any, ...]:
        return (*rows[:layer], row, *rows[layer + 1 :])

    return TierRule(rule.ladder, swap(rule.decode, other.decode[layer]), swap(rule.prefill, other.prefill[layer]))


def _source_digest(checkpoint: Checkpoint, progress: Progress) -> str:
    step = 1 << 24
    digest = ""
    with progress("reading", checkpoint.total_bytes() // step + 1) as advance:
        for _, digest in checkpoint.digest():
            advance()
    return digest


def _significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")

"""The whole pipeline: read, calibrate, quantize, measure, allocate, write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

import dymoe_compile
import dymoe_runtime
from dymoe_compile.calibration import LayerStatistics, calibrate, spilled
from dymoe_compile.checkpoint import Checkpoint
from dymoe_compile.dense import MOST_BITS, DenseChoice, choose_dense_bits, keep_choice, known_choice, write_dense
from dymoe_compile.findings import collect
from dymoe_compile.points import SENSITIVITY_TOKENS, excerpt_for, fit_policy, fits
from dymoe_compile.progress import Progress, silent
from dymoe_compile.report import render
from dymoe_compile.texts import Windows, load_texts, make_windows
from dymoe_compile.writer import BundleWriter, check_space, explaining_full_disk
from dymoe_runtime import kernels
from dymoe_runtime.budget import PROCESS_BYTES, Budget, plan_budget
from dymoe_runtime.bundle import (
    FINDINGS,
    LOOK_AHEAD,
    MANIFEST,
    POLICY,
    REPORT,
    TOKENIZER,
    TOKENIZER_EXTRAS,
    VERSION,
    Bundle,
    FileEntry,
    Manifest,
    expert_layout,
    file_entry,
    read_manifest,
)
from dymoe_runtime.device import AUTO, Profile, default_threads, format_size
from dymoe_runtime.errors import BudgetError, DymoeError, QualityError
from dymoe_runtime.model import check_ids
from dymoe_runtime.policy import Policy
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.text import Tokenizer

# Context for which the profile's memory is checked.
PROFILE_CONTEXT = 2048


@dataclass(frozen=True)
class CompileOptions:
    """What to compile, for which device, and how; `ladder` and `dense_bits` override the profile's."""

    model: Path
    output: Path
    profile: Profile
    ladder: tuple[int, ...]
    dense_bits: int | str  # of every kind of dense weights, or AUTO
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 65536
    seed: int = 0
    jobs: int | None = None
    fresh: bool = False
    max_kl: float | None = None


def compile_bundle(options: CompileOptions, progress: Progress = silent) -> tuple[Bundle, bool]:
    """Compile `options.model` to the bundle `options.output`; the bundle, and whether anything had to be done."""
    # A link at the output is followed: what it points to is replaced, not the link.
    options = replace(options, output=options.output.resolve())
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
    check_ids([*windows.train.reshape(-1).tolist(), *windows.held_out.reshape(-1).tolist()], checkpoint.spec)
    provenance = describe(options, checkpoint, windows, progress)
    if not options.fresh and (bundle := up_to_date(options.output, provenance)):
        check_quality(bundle, options)
        return bundle, False
    return build(options, checkpoint, windows, provenance, progress), True


@torch.inference_mode()
@np.errstate(over="ignore", invalid="ignore")  # what is not finite gets a sentence
def build(
    options: CompileOptions, checkpoint: Checkpoint, windows: Windows, provenance: dict[str, Any], progress: Progress
) -> Bundle:
    """Write the bundle; a run that was interrupted goes on with its last whole layer."""
    needed = bundle_bytes(checkpoint.spec, options, windows.train.size + windows.held_out.size)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        explaining_full_disk(options.output, needed),
        contextlib.closing(BundleWriter(options.output, provenance | progress_key(), options.fresh)) as writer,
    ):
        check_space(writer.directory, needed - writer.used_bytes())
        copy_tokenizer(options.model, writer)
        known = known_choice(checkpoint.spec, options.dense_bits, writer)
        choice = known or DenseChoice.alike(checkpoint.spec, MOST_BITS)
        dense_crc32 = write_dense(checkpoint, choice.bits, writer, progress)
        original, statistics, layers = calibrate(checkpoint, windows, options.ladder, options.seed, writer, progress)
        writer.write_small(LOOK_AHEAD, look_ahead_bytes(statistics))
        manifest = Manifest(
            checkpoint.spec, options.ladder, choice.bits, files_of(writer.directory), dense_crc32, layers, provenance
        )
        draft = Bundle(writer.directory, manifest, Policy(options.ladder, (), (), ""))
        if known is None:
            excerpt = excerpt_for(checkpoint.spec, windows.held_out, original, SENSITIVITY_TOKENS)
            choice = choose_dense_bits(draft, checkpoint, *excerpt, profile_budget(draft, options.profile), progress)
            keep_choice(choice, writer)
            dense_crc32 = write_dense(checkpoint, choice.bits, writer, progress)
            manifest = replace(
                manifest, dense_bits=choice.bits, files=files_of(writer.directory), dense_crc32=dense_crc32
            )
            draft = Bundle(writer.directory, manifest, draft.policy)
        fitted = fit_policy(draft, windows.held_out, original, statistics, options.profile, progress)
        check_quality(Bundle(writer.directory, manifest, fitted.policy), options)
        findings = collect(manifest, choice.added_kl, statistics, fitted)
        writer.write_small(POLICY, _json_bytes(fitted.policy.to_json()))
        writer.write_small(FINDINGS, _json_bytes(findings))
        writer.write_small(REPORT, render(findings).encode())
        writer.finish(replace(manifest, files=files_of(writer.directory)))
    return Bundle.open(options.output)


def check_output(output: Path) -> None:
    """DymoeError where writing to `output` would destroy something that is not a bundle."""
    if not output.exists():
        return
    if not output.is_dir() or output.is_mount() or not _holds_only_a_bundle(output):
        raise DymoeError(f"{output}: exists and is not a bundle, or holds other files; choose another place with -o")


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
        "calibration_tokens": windows.train.size,
        "held_out_tokens": windows.held_out.size,
        "calibration_token_limit": options.calibration_tokens,
        "ladder": list(options.ladder),
        "dense_bits": options.dense_bits,
        "seed": options.seed,
        "profile": {**asdict(options.profile), "ladder": list(options.profile.ladder)},
    }


def progress_key() -> dict[str, str]:
    """What an interrupted run must share with the one that goes on with it, beside the provenance.

    A finished bundle is good whatever made it; but half a bundle continued by another version, or by
    other kernels, would be one that neither of them makes.
    """
    sources = hashlib.sha256()
    for package in (dymoe_compile, dymoe_runtime):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            sources.update(path.read_bytes())
    return {"sources_sha256": sources.hexdigest(), "kernels": kernels.isa()}


def up_to_date(output: Path, provenance: dict[str, Any]) -> Bundle | None:
    """The bundle at `output` if it is whole and made from the same things."""
    try:
        if read_manifest(output).provenance == provenance:
            return Bundle.open(output)
    except DymoeError:
        pass
    return None


def bundle_bytes(spec: ModelSpec, options: CompileOptions, tokens: int) -> int:
    """About what the bundle and the state of an interrupted run take on the disk."""
    auto = options.dense_bits == AUTO
    bits = min(MOST_BITS if auto else int(options.dense_bits), 15) + 1
    dense = sum(int(np.prod(shape)) for shape in spec.tensor_shapes().values()) * bits // 8
    # Dense weights may be written once more at other bits, beside what is there.
    dense *= 2 if auto else 1
    records = len(spec.moe_layers) * spec.num_experts * expert_layout(spec, options.ladder).record_bytes
    state = (4 if spilled(tokens, spec.hidden_size) else 2) * 4 * tokens * spec.hidden_size
    return dense + records + state + (1 << 20)


def copy_tokenizer(model: Path, writer: BundleWriter) -> None:
    for name in (TOKENIZER, *TOKENIZER_EXTRAS):
        if (model / name).exists():
            writer.write_small(name, (model / name).read_bytes())


def look_ahead_bytes(statistics: Mapping[int, LayerStatistics]) -> bytes:
    """The predictors of those layers that have one, by layer, as a safetensors file."""
    return save({str(layer): seen.predictor for layer, seen in statistics.items() if seen.predictor.size})


def check_quality(bundle: Bundle, options: CompileOptions) -> None:
    """BudgetError if the profile's device cannot run the bundle; QualityError if no point reaches --max-kl."""
    floor = profile_budget(bundle, options.profile).floor
    if floor > options.profile.memory_bytes:
        raise BudgetError(
            f"profile {options.profile.name}: {format_size(options.profile.memory_bytes)} of memory are too little, "
            f"this bundle needs at least {format_size(floor)}; choose a larger profile or fewer --dense-bits"
        )
    fitting = [point.kl for point in bundle.policy.points if fits(point, bundle, options.profile)]
    best = min(fitting, default=math.inf)
    if options.max_kl is not None and not best <= options.max_kl:
        reached = f"the best has {best:g}" if fitting else "none fits"
        raise QualityError(
            f"no operating point within the {format_size(options.profile.memory_bytes)} of profile "
            f"{options.profile.name} reaches a KL of {options.max_kl:g}, {reached}; "
            "choose a larger profile, other --tiers or raise --max-kl"
        )


def profile_budget(bundle: Bundle, profile: Profile) -> Budget:
    """How the memory of the profile's device would be divided."""
    context = min(PROFILE_CONTEXT, bundle.spec.max_context)
    return plan_budget(bundle, context, memory=profile.memory_bytes, fixed=PROCESS_BYTES)


def files_of(directory: Path) -> dict[str, FileEntry]:
    """The files of a bundle, as its manifest lists them."""
    small = {POLICY, FINDINGS, REPORT, LOOK_AHEAD, TOKENIZER, *TOKENIZER_EXTRAS}
    return {
        path.name: file_entry(path, digest=path.name in small)
        for path in sorted(directory.iterdir())
        if path.name in small or path.suffix == ".safetensors"
    }


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _holds_only_a_bundle(directory: Path) -> bool:
    """Whether a directory is empty, or has a manifest of ours and nothing that it does not name."""
    present = {path.name for path in directory.iterdir()}
    try:
        if not present:
            return True
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return "ladder" in manifest and present <= {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _source_digest(checkpoint: Checkpoint, progress: Progress) -> str:
    step = 1 << 24
    with progress("reading", checkpoint.total_bytes() // step + 1) as advance:
        return checkpoint.digest(advance, step)

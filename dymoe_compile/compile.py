"""The whole pipeline: read, calibrate, quantize, measure, allocate, write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

import dymoe_compile
import dymoe_runtime
from dymoe_compile.calibrate.calibration import calibrate
from dymoe_compile.calibrate.statistics import LayerStatistics
from dymoe_compile.calibrate.texts import Windows, load_texts, make_windows
from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.job.device import profile_budget
from dymoe_compile.job.failed import clear_findings, leaving_findings
from dymoe_compile.job.profile import Profile, fits
from dymoe_compile.job.progress import Progress, silent
from dymoe_compile.job.writer import BundleWriter, check_space, explaining_full_disk
from dymoe_compile.plan.sizes import MAX_BITS, disk_bytes, smallest_bundle
from dymoe_compile.plan.work import SENSITIVITY_TOKENS
from dymoe_compile.policy.dense_bits import (
    DenseChoice,
    choose_dense_bits,
    keep_choice,
    known_choice,
    write_dense,
)
from dymoe_compile.policy.operating_points import excerpt_for, fit_policy
from dymoe_compile.policy.sensitivity import Original
from dymoe_compile.report import examples
from dymoe_compile.report.findings import Source, collect
from dymoe_compile.report.page import render
from dymoe_runtime.bundle.bundle import (
    ADDED_TOKENS,
    DENSE,
    FINDINGS,
    LOOK_AHEAD,
    POLICY,
    REPORT,
    TOKENIZER,
    TOKENIZER_EXTRAS,
    VERSION,
    Bundle,
    FileEntry,
    LayerEntry,
    Manifest,
    file_entry,
    read_manifest,
)
from dymoe_runtime.bundle.policy import Policy
from dymoe_runtime.errors import BudgetError, DymoeError, QualityError
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.place import holds_only_a_bundle
from dymoe_runtime.process import default_threads
from dymoe_runtime.storage import read_member
from dymoe_runtime.text.added_tokens import whole_tokenizer
from dymoe_runtime.text.tokenizer import Tokenizer
from dymoe_runtime.text.tokenizer_files import RESTORE
from dymoe_runtime.units import format_size


@dataclass(frozen=True)
class CompileOptions:
    """The checkpoint, the device and the settings of a compilation.

    `ladder` and `dense_bits` override those of the profile. `origin` is the repository and the commit of a checkpoint
    that was fetched from the hub, and empty for any other.
    """

    model: Path
    output: Path
    profile: Profile
    ladder: tuple[int, ...]
    dense_bits: int | str  # bits of every kind of dense weights, or AUTO
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 65536
    seed: int = 0
    jobs: int | None = None
    fresh: bool = False
    max_kl: float | None = None
    examples: bool = True  # whether findings and report quote the calibration text
    origin: Mapping[str, str] = field(default_factory=dict)


def compile_bundle(options: CompileOptions, kernels: Kernels, progress: Progress = silent) -> tuple[Bundle, bool]:
    """Compile `options.model` to the bundle `options.output`.

    Returns the bundle, and whether it was compiled now; False means that it was up to date.

    Raises DymoeError for errors that the user can fix, QualityError if no operating point reaches `options.max_kl`, and
    BudgetError if the profile's device cannot run the bundle: before any weights are read, where that is known by then.
    """
    options = replace(options, output=resolved(options.output))
    torch.set_num_threads(options.jobs or default_threads())
    check_output(options.output)
    checkpoint = Checkpoint.open(options.model, options.ladder)
    tokenizer = Tokenizer.load(options.model)
    check_memory(smallest_bundle(checkpoint.spec, options.ladder, options.dense_bits), options.profile, kernels)
    windows = make_windows(
        load_texts(options.calibration),
        tokenizer.encode,
        checkpoint.spec.max_context,
        options.calibration_tokens,
        options.seed,
    )
    checkpoint.spec.check_ids([*windows.train.reshape(-1).tolist(), *windows.held_out.reshape(-1).tolist()])
    provenance = describe(options, checkpoint, windows, progress)
    if not options.fresh and (bundle := up_to_date(options.output, provenance)):
        BundleWriter.clear(options.output)
        check_quality(bundle, options, kernels)
        return bundle, False
    return build(options, checkpoint, tokenizer, windows, provenance, kernels, progress), True


@torch.inference_mode()
@np.errstate(over="ignore", invalid="ignore")  # the checks for finite values raise DymoeError
def build(
    options: CompileOptions,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    windows: Windows,
    provenance: dict[str, Any],
    kernels: Kernels,
    progress: Progress,
) -> Bundle:
    """Write the bundle; an interrupted run continues after its last complete layer.

    Raises the same errors as `compile_bundle`.
    """
    tokens = windows.train.size + windows.held_out.size
    needed = disk_bytes(checkpoint.spec, options.ladder, options.dense_bits, tokens)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        explaining_full_disk(options.output, needed),
        contextlib.closing(BundleWriter(options.output, provenance | progress_key(kernels), options.fresh)) as writer,
    ):
        check_space(writer.directory, needed - writer.used_bytes())
        copy_tokenizer(options.model, writer)
        known = known_choice(checkpoint.spec, options.dense_bits, writer)
        choice = known or DenseChoice.alike(checkpoint.spec, MAX_BITS)
        dense_crc32 = write_dense(checkpoint, choice.bits, writer, kernels, progress)
        done = calibrate(checkpoint, windows, options.ladder, options.seed, writer, kernels, progress)
        original, statistics = Original(done.hidden, done.head), done.statistics
        writer.write_small(LOOK_AHEAD, look_ahead_bytes(statistics))
        manifest = Manifest(
            checkpoint.spec,
            options.ladder,
            choice.bits,
            files_of(writer.directory, done.layers),
            dense_crc32,
            done.layers,
            {**provenance, "built_with": built_with(options, kernels)},
        )
        draft = Bundle(writer.directory, manifest, Policy(options.ladder, (), (), ""))
        if known is None:
            excerpt = excerpt_for(checkpoint.spec, windows.held_out, original, SENSITIVITY_TOKENS)
            budget = profile_budget(draft, options.profile, kernels)
            choice = choose_dense_bits(draft, checkpoint, *excerpt, budget, kernels, progress)
            keep_choice(choice, writer)
            dense_crc32 = write_dense(checkpoint, choice.bits, writer, kernels, progress)
            manifest = replace(
                manifest, dense_bits=choice.bits, files=files_of(writer.directory, done.layers), dense_crc32=dense_crc32
            )
            draft = Bundle(writer.directory, manifest, draft.policy)
        fitted = fit_policy(draft, windows.held_out, original, statistics, options.profile, kernels, progress)
        quoted = examples.describe(fitted.examples, windows.held_out, tokenizer) if options.examples else None
        source = Source(checkpoint.total_bytes(), checkpoint.left_out)
        findings = collect(draft, kernels, source, choice.added_kl, statistics, fitted, quoted)
        writer.write_small(POLICY, _json_bytes(fitted.policy.to_json()))
        writer.write_small(FINDINGS, _json_bytes(findings))
        writer.write_small(REPORT, render(findings).encode())
        with leaving_findings(writer.directory, options.output):
            check_quality(Bundle(writer.directory, manifest, fitted.policy), options, kernels)
        writer.finish(replace(manifest, files=files_of(writer.directory, done.layers, whole=True)))
        clear_findings(options.output)
    return Bundle.open(options.output)


def resolved(output: Path) -> Path:
    """Return what a link at the output leads to, so that its target is replaced and not the link.

    Raises DymoeError if it leads nowhere.
    """
    try:
        return output.resolve()
    except RuntimeError as error:  # how Python before 3.13 reports a loop
        raise DymoeError(f"{output}: a symbolic link that leads to itself; choose another place with -o") from error
    except ValueError as error:
        raise DymoeError(f"{output}: not the name of a file ({error}); choose another place with -o") from error


def check_output(output: Path) -> None:
    """Raise DymoeError if writing to `output` would destroy something that is not a bundle."""
    if not os.path.lexists(output):
        return
    if not output.is_dir() or output.is_mount() or not holds_only_a_bundle(output):
        raise DymoeError(f"{output}: exists and is not a bundle, or holds other files; choose another place with -o")


def describe(options: CompileOptions, checkpoint: Checkpoint, windows: Windows, progress: Progress) -> dict[str, Any]:
    """Return the provenance of the input and the options."""
    tokenizer = hashlib.sha256()
    for name in (TOKENIZER, *TOKENIZER_EXTRAS, ADDED_TOKENS):
        if (data := read_member(options.model / name, RESTORE)) is not None:
            tokenizer.update(name.encode() + data)
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
        "profile": options.profile.to_json(),
        **({} if options.examples else {"examples": False}),
        **({"origin": dict(options.origin)} if options.origin else {}),
    }


def built_with(options: CompileOptions, kernels: Kernels) -> dict[str, Any]:
    """Return what else decides the last bits of a bundle, because it changes how sums are rounded."""
    return {
        "threads": options.jobs or default_threads(),
        "instruction_set": kernels.name,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


def progress_key(kernels: Kernels) -> dict[str, str]:
    """Return the values that an interrupted run and its continuation must share, in addition to the provenance.

    A finished bundle is valid whichever version made it. But if one version, or one set of kernels, continued what
    another began, the result would be a bundle that neither makes alone.
    """
    sources = hashlib.sha256()
    for package in (dymoe_compile, dymoe_runtime):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            sources.update(path.read_bytes())
    return {"sources_sha256": sources.hexdigest(), "kernels": kernels.name}


def up_to_date(output: Path, provenance: dict[str, Any]) -> Bundle | None:
    """Return the bundle at `output` if it is complete and has this provenance, else None.

    Another commit of the repository with the same weights and tokenizer is the same, and so is another machine that
    built the bundle.
    """
    other: dict[str, None] = {"origin": None, "built_with": None}
    try:
        if {**read_manifest(output).provenance, **other} == {**provenance, **other}:
            return Bundle.open(output)
    except DymoeError:
        pass
    return None


def copy_tokenizer(model: Path, writer: BundleWriter) -> None:
    """Copy the tokenizer files of the checkpoint `model` to the bundle; its tokenizer.json gets all added tokens."""
    writer.write_small(TOKENIZER, whole_tokenizer(model))
    for name in TOKENIZER_EXTRAS:
        if (data := read_member(model / name, RESTORE)) is not None:
            writer.write_small(name, data)


def look_ahead_bytes(statistics: Mapping[int, LayerStatistics]) -> bytes:
    """Return the bytes of a safetensors file of the predictors: layer -> predictor, for the layers that have one."""
    return save({str(layer): seen.predictor for layer, seen in statistics.items() if seen.predictor.size})


def check_memory(bundle: Bundle, profile: Profile, kernels: Kernels) -> None:
    """Raise BudgetError if the profile's device cannot run the bundle."""
    floor = profile_budget(bundle, profile, kernels).floor_bytes
    if floor > profile.memory_bytes:
        raise BudgetError(
            f"profile {profile.name}: {format_size(profile.memory_bytes)} of memory are too little, "
            f"this bundle needs at least {format_size(floor)}; choose a larger profile or fewer --dense-bits"
        )


def check_quality(bundle: Bundle, options: CompileOptions, kernels: Kernels) -> None:
    """Raise BudgetError if the profile's device cannot run the bundle, QualityError if no point reaches --max-kl."""
    check_memory(bundle, options.profile, kernels)
    fitting = [point.kl for point in bundle.policy.points if fits(point, bundle, options.profile)]
    best = min(fitting, default=math.inf)
    if options.max_kl is not None and not best <= options.max_kl:
        reached = f"the best has {best:g}" if fitting else "none fits"
        raise QualityError(
            f"no operating point within the {format_size(options.profile.memory_bytes)} of profile "
            f"{options.profile.name} reaches a KL of {options.max_kl:g}, {reached}; "
            "choose a larger profile, other --tiers or raise --max-kl"
        )


def files_of(directory: Path, layers: Mapping[int, LayerEntry], whole: bool = False) -> dict[str, FileEntry]:
    """Return the files of a bundle as its manifest lists them; weights get a digest only if `whole` is true."""
    small = {POLICY, FINDINGS, REPORT, LOOK_AHEAD, TOKENIZER, *TOKENIZER_EXTRAS}
    weights = {DENSE, *(entry.file for entry in layers.values())}
    return {
        path.name: file_entry(path, digest=whole or path.name in small)
        for path in sorted(directory.iterdir())
        if path.name in small | weights
    }


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _source_digest(checkpoint: Checkpoint, progress: Progress) -> str:
    step = 1 << 24
    with progress("reading", checkpoint.total_bytes() // step + 1) as advance:
        return checkpoint.digest(advance, step)

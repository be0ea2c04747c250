"""The dymoe-compile command: read the flags, compile a checkpoint, print a description of the bundle."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from dymoe_compile.checkpoint.tensors import CheckpointTensors
from dymoe_compile.hub import Repository, fetch
from dymoe_compile.job.profile import check_dense_bits, load_profile, shipped_profiles
from dymoe_runtime.bundle.tiers import check_ladder
from dymoe_runtime.cli.flags import EXIT_CODES, FlagsCommand, GroupedOption, flag, options_of, with_flags
from dymoe_runtime.console import MAX_SEED, json_progress, one_sentence, print_json, say, stage_progress
from dymoe_runtime.errors import BudgetError, DymoeError, QualityError, needing_extra
from dymoe_runtime.process import MAX_THREADS, default_threads

DEFAULT_PROFILE = "laptop-8gb"
DEVICE, CALIBRATION, PRECISION, WORK, OUTPUT = "Device", "Calibration", "Precision", "Work", "Output"
EXAMPLES = (
    "dymoe-compile path/to/checkpoint -o my.dymoe",
    "dymoe-compile Qwen/Qwen3-30B-A3B -o my.dymoe",
    "dymoe-compile path/to/checkpoint -o my.dymoe --profile laptop-16gb --calibration my-texts.jsonl",
    "dymoe-compile path/to/checkpoint -o my.dymoe --profile board.toml --max-kl 0.05 --json",
    "dymoe-compile Qwen/Qwen3-30B-A3B --plan",
    "dymoe-compile path/to/checkpoint --plan --profile laptop-8gb raspberry-pi-5-8gb --json",
)
OWN_EXIT_CODES = (
    ("3", "no operating point that fits the profile's memory reaches --max-kl"),
    ("4", "the device of a profile that was given has too little memory for the bundle"),
)


@dataclass(frozen=True)
class CompileFlags:
    """All flags of dymoe-compile."""

    output: Path | None = flag(
        "-o",
        "--output",
        group=OUTPUT,
        type=click.Path(path_type=Path),
        help="The bundle, by convention NAME.dymoe. Only --plan goes without.",
    )
    plan: bool = flag(
        "--plan",
        group=WORK,
        default=False,
        help="Read no weights: print sizes, least memory and expected speed on each profile, and exit.",
    )
    profile: tuple[str, ...] = flag(
        "--profile",
        group=DEVICE,
        default=(),
        multiple=True,
        metavar="NAME…",
        help=f"Device to compile for: a shipped name or a .toml file. Default: {DEFAULT_PROFILE}; with --plan, which "
        "takes several, all that are shipped.",
    )
    calibration: tuple[str, ...] = flag(
        "--calibration",
        group=CALIBRATION,
        default=(),
        multiple=True,
        metavar="FILE…",
        help="Plain text, or JSONL with a `text` field. Default: a shipped mix.",
    )
    calibration_tokens: int = flag(
        "--calibration-tokens",
        group=CALIBRATION,
        default=65536,
        type=click.IntRange(256),
        show_default=True,
        help="How much of it to use.",
    )
    seed: int = flag(
        "--seed",
        group=CALIBRATION,
        default=0,
        type=click.IntRange(0, MAX_SEED),
        show_default=True,
        help="Seed of the samples that are taken from it.",
    )
    tiers: str | None = flag(
        "--tiers", group=PRECISION, help="Bits of the expert tiers, such as 2,3,4. Default: the profile's."
    )
    dense_bits: str | None = flag(
        "--dense-bits",
        group=PRECISION,
        metavar="BITS",
        help="Bits of everything else: 4 to 8, 16, or auto: what fewer bits cost is measured, and weighed against "
        "speed and memory. Default: the profile's.",
    )
    max_kl: float | None = flag(
        "--max-kl",
        group=PRECISION,
        type=float,
        help="Fail unless an operating point that fits the profile's memory reaches this KL.",
    )
    jobs: int | None = flag(
        "--jobs",
        group=WORK,
        type=click.IntRange(1, MAX_THREADS),
        help="Threads. Default: all cores that this process may use.",
    )
    fresh: bool = flag(
        "--fresh", group=WORK, default=False, help="Start over instead of going on or keeping what is up to date."
    )
    no_examples: bool = flag(
        "--no-examples",
        group=OUTPUT,
        default=False,
        help="Do not quote the calibration text in compile.json and report.html, which show examples from it.",
    )
    progress: str = flag(
        "--progress",
        group=OUTPUT,
        default="text",
        type=click.Choice(("text", "json")),
        show_default=True,
        help="How stderr says what is being done: for people, or as one JSON object a line.",
    )
    as_json: bool = flag("--json", group=OUTPUT, default=False, help="Print one JSON object, alone, to stdout.")


class SupportedOption(GroupedOption):
    """A flag that prints what can be compiled, as JSON with --json, and ends the command."""

    def __init__(self) -> None:
        super().__init__(
            ["--supported"],
            group=OUTPUT,
            is_flag=True,
            is_eager=True,  # MODEL and -o may be missing
            expose_value=False,
            help="Print the families and formats that can be compiled, and exit.",
        )

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        if opts.get(str(self.name)) and not ctx.resilient_parsing:
            print_supported(as_json=bool(opts.get("as_json")))
            ctx.exit()
        return super().handle_parse_result(ctx, opts, args)


def print_supported(as_json: bool) -> None:
    """Print the families and the formats of checkpoints that can be compiled."""
    from dymoe_compile import catalogue

    if as_json:
        print_json(catalogue.to_json())
        return
    formatter = click.HelpFormatter()
    with formatter.section("Families, by the model_type of config.json"):
        families = catalogue.supported_families()
        formatter.write_dl([(", ".join((family.model_type, *family.aliases)), family.about) for family in families])
    with formatter.section("Tensors in safetensors files"):
        formatter.write_dl([(kind.name, kind.about) for kind in catalogue.supported_formats()])
    with formatter.section("Values of quant_method in config.json"):
        formatter.write_text(", ".join(catalogue.quant_methods()))
    click.echo(formatter.getvalue().strip())


@one_sentence
@with_flags(CompileFlags)
def compile_command(flags: CompileFlags, model: str) -> None:
    """Compile the Hugging Face MoE checkpoint MODEL, a directory or OWNER/NAME[@REVISION] on the hub, into a bundle."""
    if flags.plan:
        return print_plan(flags, model)
    if flags.output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    values = _checked(flags)
    directory, origin = _located(model)
    CheckpointTensors.open(directory)
    # PyTorch takes seconds to load; --help, a wrong flag and a wrong directory must not wait for it.
    with needing_extra("compile", "compiling"):
        from dymoe_compile.compile import CompileOptions, compile_bundle
    from dymoe_runtime.kernels import load_kernels
    from dymoe_runtime.tools.describe import describe, format_description

    kernels = load_kernels(threads=flags.jobs)
    if kernels.notice is not None:
        click.echo(f"note: {kernels.notice}", err=True)
    progress = json_progress if flags.progress == "json" else stage_progress
    options = CompileOptions(model=directory, output=flags.output, origin=origin, **values)
    try:
        bundle, changed = compile_bundle(options, kernels, progress)
    except (QualityError, BudgetError) as error:
        if flags.as_json:
            print_json({"changed": False, "failed": str(error)})
        raise
    description = describe(bundle, kernels)
    if flags.as_json:
        print_json({"changed": changed, **description})
    elif changed:
        say(format_description(description))
    else:
        say(f"{flags.output}: up to date")


main = click.version_option(package_name="dymoe")(
    FlagsCommand(
        "dymoe-compile",
        params=[click.Argument(["model"]), *options_of(CompileFlags), SupportedOption()],
        callback=compile_command,
        help=compile_command.__doc__,
        examples=EXAMPLES,
        exit_codes=(*EXIT_CODES[:3], *OWN_EXIT_CODES, *EXIT_CODES[3:]),
    )
)


def _located(model: str) -> tuple[Path, dict[str, str]]:
    """Return the directory of the checkpoint MODEL, and where on the hub it came from, empty for a directory."""
    repository = None if os.path.lexists(model) else Repository.parse(model)
    if repository is None:
        return Path(model), {}
    with needing_extra("compile", "compiling"):  # said before many gigabytes are fetched
        if find_spec("torch") is None:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
    snapshot = fetch(repository, _note)
    return snapshot.directory, snapshot.origin


def print_plan(flags: CompileFlags, model: str) -> None:
    """Print the plan of compiling MODEL; raise BudgetError if a profile that was asked for cannot run the bundle."""
    from dymoe_compile.plan.plan import Wanted, make_plan
    from dymoe_compile.plan.source import read_source
    from dymoe_compile.plan.table import format_plan, free_bytes
    from dymoe_runtime.kernels import load_kernels

    if flags.max_kl is not None:
        raise click.UsageError("--max-kl does not go with --plan: only compiling measures quality")
    profiles = [load_profile(name) for name in dict.fromkeys(flags.profile or shipped_profiles())]
    wanted = Wanted(
        None if flags.tiers is None else _ladder(flags.tiers),
        None if flags.dense_bits is None else _dense_bits(flags.dense_bits),
        flags.calibration_tokens,
        flags.jobs or default_threads(),
    )
    repository = None if os.path.lexists(model) else Repository.parse(model)
    directory = Path(model) if repository is None else fetch(repository, _note, weights=False).directory
    plan = make_plan(read_source(directory), profiles, wanted, load_kernels(threads=flags.jobs))
    if flags.as_json:
        print_json(plan)
    else:
        say(format_plan(plan, free_bytes(flags.output or Path())))
    unfit = [profile["name"] for profile in plan["profiles"] if not profile["fits"]]
    if flags.profile and unfit:
        raise BudgetError(f"{', '.join(unfit)}: too little memory for the bundle; the plan says how much it needs")


def _checked(flags: CompileFlags) -> dict[str, Any]:
    """Return the checked fields of CompileOptions, without model and output."""
    if len(flags.profile) > 1:
        raise click.UsageError("--profile takes several devices with --plan only; a bundle is compiled for one")
    profile = load_profile(flags.profile[0] if flags.profile else DEFAULT_PROFILE)
    dense_bits = profile.dense_bits if flags.dense_bits is None else _dense_bits(flags.dense_bits)
    if flags.max_kl is not None and not 0 < flags.max_kl < math.inf:
        raise DymoeError(f"--max-kl {flags.max_kl}: expected a number above 0")
    return {
        "profile": profile,
        "ladder": profile.ladder if flags.tiers is None else _ladder(flags.tiers),
        "dense_bits": dense_bits,
        "calibration": flags.calibration,
        "calibration_tokens": flags.calibration_tokens,
        "seed": flags.seed,
        "jobs": flags.jobs,
        "fresh": flags.fresh,
        "max_kl": flags.max_kl,
        "examples": not flags.no_examples,
    }


def _dense_bits(text: str) -> int | str:
    bits = int(text) if re.fullmatch("[0-9]{1,2}", text) else text
    check_dense_bits(bits, "--dense-bits")
    return bits


def _note(sentence: str) -> None:
    say(f"note: {sentence}", err=True)


def _ladder(text: str) -> tuple[int, ...]:
    try:
        return check_ladder([int(part) for part in text.split(",")])
    except ValueError as error:
        raise DymoeError(f"--tiers {text}: expected increasing bits between 2 and 8, such as 2,3,4") from error

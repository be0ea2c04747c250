"""dymoe-compile: options in, a bundle out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from dymoe_runtime import kernels
from dymoe_runtime.console import MOST_SEED, MOST_THREADS, ManyValues, one_sentence, print_json, progress_bar
from dymoe_runtime.device import check_dense_bits, load_profile
from dymoe_runtime.errors import DymoeError, importing
from dymoe_runtime.inspect import describe, format_description
from dymoe_runtime.spec import check_ladder

DEFAULT_PROFILE = "laptop-8gb"


@click.command(cls=ManyValues)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The bundle, by convention NAME.dymoe."
)
@click.option("--profile", default=DEFAULT_PROFILE, show_default=True, help="Device: a shipped name or a .toml file.")
@click.option(
    "--calibration",
    multiple=True,
    metavar="FILE…",
    help="Plain text, or JSONL with a `text` field. Default: a shipped mix.",
)
@click.option(
    "--calibration-tokens", type=click.IntRange(256), default=65536, show_default=True, help="How much of it to use."
)
@click.option("--tiers", help="Bits of the expert tiers, such as 2,3,4. Default: the profile's.")
@click.option(
    "--dense-bits",
    metavar="BITS",
    help="Bits of everything else: 4 to 8, 16, or auto: 8 if all fits the profile's memory, else by what fewer cost. "
    "Default: the profile's.",
)
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True)
@click.option(
    "--jobs", type=click.IntRange(1, MOST_THREADS), help="Threads. Default: all cores that this process may use."
)
@click.option("--fresh", is_flag=True, help="Start over instead of going on or keeping what is up to date.")
@click.option(
    "--max-kl", type=float, help="Exit with 3 unless an operating point that fits the profile's memory reaches this KL."
)
@click.option("--json", "as_json", is_flag=True, help="End stdout with one JSON object.")
@click.version_option(package_name="dymoe")
@one_sentence
def main(model: Path, output: Path, as_json: bool, **o: Any) -> None:
    """Compile the Hugging Face MoE checkpoint MODEL into a bundle."""
    values = _checked(o)
    # Importing torch takes seconds, which neither --help nor a wrong flag waits for.
    with importing():
        from dymoe_compile.compile import CompileOptions, compile_bundle

    if kernels.isa() == kernels.REFERENCE and kernels.missing_reason:
        click.echo(f"note: {kernels.missing_reason}", err=True)
    bundle, changed = compile_bundle(CompileOptions(model=model, output=output, **values), progress_bar)
    description = describe(bundle)
    if as_json:
        print_json({"changed": changed, **description})
    elif changed:
        click.echo(format_description(description))
    else:
        click.echo(f"{output}: up to date")


def _checked(o: dict[str, Any]) -> dict[str, Any]:
    """The values of CompileOptions."""
    profile = load_profile(o["profile"])
    given = o["dense_bits"]
    dense_bits = profile.dense_bits if given is None else int(given) if given.isdecimal() else given
    check_dense_bits(dense_bits, "--dense-bits")
    if o["max_kl"] is not None and not 0 < o["max_kl"] < math.inf:
        raise DymoeError(f"--max-kl {o['max_kl']}: expected a number above 0")
    return {
        "profile": profile,
        "ladder": profile.ladder if o["tiers"] is None else _ladder(o["tiers"]),
        "dense_bits": dense_bits,
        **{name: o[name] for name in ("calibration", "calibration_tokens", "seed", "jobs", "fresh", "max_kl")},
    }


def _ladder(text: str) -> tuple[int, ...]:
    try:
        return check_ladder([int(part) for part in text.split(",")])
    except ValueError as error:
        raise DymoeError(f"--tiers {text}: expected increasing bits between 2 and 8, such as 2,3,4") from error

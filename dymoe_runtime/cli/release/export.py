"""dymoe-bundle export: what other runtimes execute, made by the compiler's exporters."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.cli.flags import FlagsCommand
from dymoe_runtime.console import FiniteRange, Size, one_sentence, print_json, progress_bar, say, stage_progress
from dymoe_runtime.errors import DymoeError, needing_extra
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.units import format_size


@dataclass(frozen=True)
class Exporter:
    """An export format: the module of the exporter, the extra that it needs, and the flags that it has.

    Exporters belong to the compiler, which a runtime may be installed without. Flags of `anew` make it quantize the
    checkpoint anew, so that they go with it.
    """

    module: str
    extra: str
    flags: frozenset[str]
    anew: tuple[str, ...]


ANEW = frozenset({"tier", "checkpoint", "calibration"})
EXPORTERS = {
    "onnx": Exporter("dymoe_compile.export.onnx.export", "onnx", ANEW | {"int4", "portable", "context"}, ("int4",)),
    "gguf": Exporter("dymoe_compile.export.gguf.export", "gguf", ANEW | {"size", "bits"}, ("size", "bits")),
}
EXAMPLES = (
    "dymoe-bundle export my.dymoe -o my-onnx --format onnx --tier 4",
    "dymoe-bundle export my.dymoe -o my-onnx --format onnx --int4 --checkpoint path/to/checkpoint",
    "dymoe-bundle export my.dymoe -o my.gguf --format gguf --tier 4",
    "dymoe-bundle export my.dymoe -o my-gguf --format gguf --bits 4.5 --checkpoint path/to/checkpoint",
)


@click.command("export", cls=FlagsCommand, examples=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The directory to make, or the file of a tier in GGUF, which is not there.",
)
@click.option("--format", "form", type=click.Choice(sorted(EXPORTERS)), required=True, help="What to export to.")
@click.option("--tier", type=int, metavar="BITS", help="Tier of all experts. Default: the highest of the bundle.")
@click.option(
    "--int4", is_flag=True, help="For onnx: quantize the experts of --checkpoint anew, to whole numbers of 4 bits."
)
@click.option(
    "--size",
    type=Size(),
    metavar="SIZE",
    help="For gguf: write what llama.cpp needs to quantize --checkpoint to a file of this size.",
)
@click.option(
    "--bits", type=FiniteRange(0, 32, min_open=True), metavar="N", help="For gguf: as --size, in bits a weight."
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="The checkpoint that BUNDLE was compiled from, for --int4, --size and --bits.",
)
@click.option(
    "--calibration",
    multiple=True,
    metavar="FILE…",
    help="Texts for --checkpoint, as for dymoe-compile. Default: its shipped mix.",
)
@click.option("--portable", is_flag=True, help="For onnx: use standard operators only: slower, for any runtime.")
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="For onnx: longest context. Default: the model's, but at most 32768.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, alone, to stdout.")
@one_sentence
def export_command(bundle: Path, output: Path, form: str, as_json: bool, **options: Any) -> None:
    """Write what other runtimes execute: a model of BUNDLE with all experts at one tier, or one quantized anew."""
    exporter = EXPORTERS[form]
    given = {name: value for name, value in options.items() if value is not None and value is not False and value != ()}
    check_flags(form, given)
    if "checkpoint" in given and "tier" in given:
        say(f"note: --checkpoint is quantized anew: --tier {given['tier']} changes nothing", err=True)
    with needing_extra(exporter.extra, f"exporting to {form.upper()}"):
        module = importlib.import_module(exporter.module)
    progress = stage_progress if "checkpoint" in given else progress_bar  # calibration takes as long as compiling
    given.pop("int4", None)
    result = module.export(Bundle.open(bundle), output, module.Options(**given), load_kernels(), progress)
    if as_json:
        print_json(result)
        return
    share = ""
    if "bundle_bytes" in result:
        share = f", {result['bytes'] / result['bundle_bytes']:.2f} times the bundle's weights at this precision"
    say(f"{output}: {format_size(result['bytes'])}{share}")
    for note in result["notes"]:
        say(f"note: {note}")


def check_flags(form: str, given: Mapping[str, Any]) -> None:
    """Raise DymoeError if flags are not those of a format, or do not go together."""
    exporter = EXPORTERS[form]
    for name in given:
        if name not in exporter.flags:
            has = " or ".join(known for known, other in EXPORTERS.items() if name in other.flags)
            raise DymoeError(f"--{name} is for --format {has} alone; leave it out")
    anew = [name for name in exporter.anew if name in given]
    flags = " or ".join(f"--{name}" for name in exporter.anew)
    if len(anew) > 1:
        raise DymoeError(f"{' and '.join(f'--{name}' for name in anew)} say the same; give one of them")
    if bool(anew) != ("checkpoint" in given):
        raise DymoeError(f"{flags} and --checkpoint go together; give both or neither")
    if "calibration" in given and not anew:
        raise DymoeError(f"--calibration is for {flags} alone; leave it out")


COMMANDS: tuple[click.Command, ...] = (export_command,)

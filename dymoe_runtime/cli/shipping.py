"""Commands of dymoe-bundle that write bundles, packed, unpacked, copied or with fewer tiers, or compare two."""

from __future__ import annotations

from pathlib import Path

import click

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.cli.flags import FlagsCommand
from dymoe_runtime.console import byte_progress, one_sentence, print_json, progress_bar, say
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.units import format_size

PATH = click.Path(path_type=Path)
OUTPUT = click.option("-o", "--output", type=PATH, required=True, help="What to write; nothing may be there.")
EXPECT = click.option("--expect", metavar="DIGEST", help="Refuse a bundle of another digest than this one.")


@click.command("pack", cls=FlagsCommand, examples=("dymoe-bundle pack my.dymoe -o my-packed.dymoe",))
@click.argument("bundle", type=PATH)
@OUTPUT
@one_sentence
def pack_command(bundle: Path, output: Path) -> None:
    """Write BUNDLE as one file, which every command takes in place of a directory, and runs in place."""
    from dymoe_runtime.tools.shipping.pack import pack

    opened = Bundle.open(bundle)
    with byte_progress("pack", opened.total_bytes()) as advance:
        pack(opened, output, advance)
    say(f"{output}: {format_size(output.stat().st_size)}, digest {opened.manifest.digest}", err=True)


@click.command("unpack", cls=FlagsCommand, examples=("dymoe-bundle unpack my-packed.dymoe -o my.dymoe",))
@click.argument("packed", type=PATH)
@OUTPUT
@one_sentence
def unpack_command(packed: Path, output: Path) -> None:
    """Write the files of PACKED, which `pack` made, to a directory, and check them."""
    from dymoe_runtime.tools.shipping.pack import unpack

    if not packed.is_file():
        raise DymoeError(f"{packed}: not a file; give one that dymoe-bundle pack made")
    opened = Bundle.open(packed)
    with byte_progress("unpack", opened.total_bytes()) as advance:
        unpack(opened, output, advance)
    say(f"{output}: {format_size(opened.total_bytes())}, digest {opened.manifest.digest}", err=True)


@click.command(
    "fetch",
    cls=FlagsCommand,
    examples=(
        "dymoe-bundle fetch https://host/my.dymoe -o my.dymoe --expect DIGEST",
        "dymoe-bundle fetch /media/stick/my.dymoe -o my.dymoe",
    ),
)
@click.argument("source")
@OUTPUT
@EXPECT
@one_sentence
def fetch_command(source: str, output: Path, expect: str | None) -> None:
    """Copy the bundle SOURCE, an address or a path, and check every byte. Run again, it goes on where it stopped."""
    from dymoe_runtime.tools.shipping.fetch import fetch
    from dymoe_runtime.tools.shipping.remote import source_of

    with byte_progress("fetch", None) as advance:
        fetch(source_of(source), output, expect, advance)
    opened = Bundle.open(output)
    say(f"{output}: {format_size(opened.total_bytes())}, digest {opened.manifest.digest}", err=True)


@click.command("slim", cls=FlagsCommand, examples=("dymoe-bundle slim my.dymoe -o small.dymoe --tiers 2,3",))
@click.argument("bundle", type=PATH)
@OUTPUT
@click.option("--tiers", metavar="BITS,…", required=True, help="Tiers to keep, such as 2,3.")
@one_sentence
def slim_command(bundle: Path, output: Path, tiers: str) -> None:
    """Write BUNDLE with some of its tiers, which takes less space. The checkpoint is not needed."""
    from dymoe_runtime.tools.shipping.slim import slim

    opened = Bundle.open(bundle)
    with progress_bar("slim", opened.spec.total_experts) as advance:
        policy = slim(opened, _whole_numbers(tiers), output, advance)
    lost = [point.name for point in opened.policy.points if point.name not in {kept.name for kept in policy.points}]
    if lost:
        say(f"note: these operating points use other tiers, and are left out: {', '.join(lost)}", err=True)
    made = Bundle.open(output)
    say(f"{output}: {format_size(made.total_bytes())}, digest {made.manifest.digest}", err=True)


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise DymoeError(f"--tiers {text}: expected whole numbers such as 2,3") from error


@click.command("diff", cls=FlagsCommand, examples=("dymoe-bundle diff old.dymoe new.dymoe",))
@click.argument("one", type=PATH)
@click.argument("other", type=PATH)
@click.option("--exit-code", is_flag=True, help="Exit with 3 if the bundles differ.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, alone, to stdout.")
@one_sentence
def diff_command(one: Path, other: Path, exit_code: bool, as_json: bool) -> None:
    """Show how the bundles ONE and OTHER differ: options, weights, operating points, sizes, digests."""
    from dymoe_runtime.tools.shipping.compare import differences, format_differences

    found = differences(Bundle.open(one), Bundle.open(other))
    if as_json:
        print_json({"same": not found, "differences": [difference._asdict() for difference in found]})
    else:
        say(format_differences(found) if found else f"{one} and {other} are the same")
    if found and exit_code:
        raise SystemExit(3)


COMMANDS = (pack_command, unpack_command, fetch_command, slim_command, diff_command)

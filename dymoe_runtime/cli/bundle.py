"""dymoe-bundle: inspects a bundle, verifies it, ships it, exports it, and replays a trace of it with other memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import click

from dymoe_runtime.bundle.bundle import Bundle, read_manifest
from dymoe_runtime.bundle.records import NOT_VOUCHED, check_digest, verify
from dymoe_runtime.cli import shipping
from dymoe_runtime.cli.flags import FlagsCommand
from dymoe_runtime.cli.release import check, export, provenance
from dymoe_runtime.console import (
    Commands,
    FiniteRange,
    Size,
    one_line,
    one_sentence,
    print_json,
    progress_bar,
    say,
)
from dymoe_runtime.engine.options import MAX_DECAY
from dymoe_runtime.engine.trace import read_trace
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import replacing
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.store import DECAY, EVICTIONS
from dymoe_runtime.text.tokenizer import Tokenizer
from dymoe_runtime.tools.describe import describe, format_description
from dymoe_runtime.tools.replay import format_replay, replay, split
from dymoe_runtime.tools.replay_page import render


@click.group(cls=Commands)
@click.version_option(package_name="dymoe")
def bundle() -> None:
    """Look at a bundle, check it, ship it, export it, or replay a trace of it with other memory."""


for command in (*shipping.COMMANDS, *check.COMMANDS, *provenance.COMMANDS, *export.COMMANDS):
    bundle.add_command(command)


EXPECT = "Refuse a bundle of another digest than this one, which `dymoe-bundle digest` prints."


@bundle.command("digest", cls=FlagsCommand, examples=("dymoe-bundle digest my.dymoe",))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, alone, to stdout.")
@one_sentence
def digest_command(bundle: Path, as_json: bool) -> None:
    """Print the digest of BUNDLE, which vouches for every byte of it once `verify` has found it sound."""
    manifest = read_manifest(bundle)
    if as_json:
        print_json({"digest": manifest.digest, "vouches_for_weights": manifest.vouches})
        return
    if not manifest.vouches:
        say(f"note: {bundle}: {NOT_VOUCHED}", err=True)
    say(manifest.digest)


@bundle.command("inspect", cls=FlagsCommand, examples=("dymoe-bundle inspect my.dymoe",))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, alone, to stdout.")
@one_sentence
def inspect_command(bundle: Path, as_json: bool) -> None:
    """Sizes, effective bits, tiers and policy of BUNDLE."""
    description = describe(Bundle.open(bundle), load_kernels())
    if as_json:
        print_json(description)
    else:
        say(format_description(description))


@bundle.command("verify", cls=FlagsCommand, examples=("dymoe-bundle verify my.dymoe",))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, alone, to stdout.")
@click.option("--expect", metavar="DIGEST", help=EXPECT)
@click.option("--key", type=click.Path(path_type=Path), help="Refuse a bundle not signed with this public key, in PEM.")
@click.option(
    "--signature", type=click.Path(path_type=Path), help="The signature for --key. Default: BUNDLE.sig, beside it."
)
@one_sentence
def verify_command(bundle: Path, as_json: bool, expect: str | None, key: Path | None, signature: Path | None) -> None:
    """Check every tensor and record of BUNDLE against its checksum, and every file against its digest."""
    if signature is not None and key is None:
        raise DymoeError("--signature needs the public key that it was made for; give --key")
    opened = Bundle.open(bundle)
    if expect is not None:
        check_digest(opened, expect)
    if key is not None:
        from dymoe_runtime.tools.provenance.signature import signature_of, verify_signature

        verify_signature(opened, signature or signature_of(bundle), key)
    Tokenizer.load(bundle, opened.spec.eos_ids)
    checked, problems = 0, []
    pieces = len(opened.manifest.dense_crc32) + opened.spec.total_experts + 2 * len(opened.manifest.layers) + 3
    with progress_bar("verify", pieces) as advance:
        for _, problem in verify(opened):
            advance()
            checked += 1
            if problem and problem not in problems:  # a header that cannot be read is one for each of its tensors
                problems.append(problem)
    if as_json:
        vouches = opened.manifest.vouches
        print_json({"ok": not problems, "checked": checked, "problems": problems, "vouches_for_weights": vouches})
    if problems:
        for problem in problems[1:]:
            click.echo(one_line(problem), err=True)
        raise DymoeError(problems[0])
    if not as_json:
        signed = "" if key is None else f", signed with {key}"
        say(f"{bundle}: {checked} pieces checked, all sound{signed}")
        if not opened.manifest.vouches:
            say(f"note: {bundle}: {NOT_VOUCHED}", err=True)


@bundle.command("replay", cls=FlagsCommand, examples=("dymoe-bundle replay my.dymoe trace.jsonl --arena 1GiB",))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("trace", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--arena",
    "arenas",
    type=Size(),
    multiple=True,
    metavar="SIZE…",
    help="Memory for experts. Default: 10, 25, 50 and 75% of all.",
)
@click.option(
    "--decay",
    "--fade",
    "decays",
    type=FiniteRange(1, MAX_DECAY),
    multiple=True,
    metavar="X…",
    help=f"Factor by which a use counts more with each token: 1 is LFU, 2 nearly LRU. Default: {DECAY}.",
)
@click.option(
    "--eviction",
    "evictions",
    type=click.Choice(EVICTIONS),
    multiple=True,
    help=f"What leaves memory first. Default: {EVICTIONS[0]}.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Write an HTML page: where the time of each token went, and the replay.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, alone, to stdout.")
@one_sentence
def replay_command(
    bundle: Path,
    trace: Path,
    arenas: Sequence[int],
    decays: Sequence[float],
    evictions: Sequence[str],
    plot: Path | None,
    as_json: bool,
) -> None:
    """How a TRACE of BUNDLE would have fared with other memory."""
    opened = Bundle.open(bundle)
    lines = list(read_trace(trace, opened))
    sizes = arenas or [int(opened.expert_bytes() * share) for share in (0.1, 0.25, 0.5, 0.75)]
    settings = list(itertools.product(sizes, evictions or EVICTIONS[:1], decays or (DECAY,)))
    rows = []
    with progress_bar("replay", len(settings)) as advance:
        for size, eviction, decay in settings:
            rows.append(replay(opened, lines, size, decay, eviction))
            advance()
    if plot is not None:
        chart = render(lines, rows, trace.name).encode()
        with replacing(plot) as file:
            file.write(chart)
    if as_json:
        print_json({"traced": split(lines), "replayed": rows})
    else:
        click.echo(format_replay(split(lines), rows))

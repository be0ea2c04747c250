"""Commands of dymoe-bundle that say what a bundle was made from, and sign that."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.cli.flags import FlagsCommand
from dymoe_runtime.console import one_sentence, say
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import replacing

PATH = click.Path(path_type=Path)
OUTPUT = click.option("-o", "--output", type=PATH, help="The file to write. Default: stdout.")
BUILDER = click.option("--builder", metavar="URI", help="Who compiled it, such as the address of a CI workflow.")


@click.command("attest", cls=FlagsCommand, examples=("dymoe-bundle attest my.dymoe -o provenance.json",))
@click.argument("bundle", type=PATH)
@OUTPUT
@BUILDER
@one_sentence
def attest_command(bundle: Path, output: Path | None, builder: str | None) -> None:
    """Write what BUNDLE was made from, as an in-toto statement with SLSA provenance. This reads all of it."""
    _write(_statement(Bundle.open(bundle), builder), output)


@click.command("sbom", cls=FlagsCommand, examples=("dymoe-bundle sbom my.dymoe -o my.cdx.json",))
@click.argument("bundle", type=PATH)
@OUTPUT
@one_sentence
def sbom_command(bundle: Path, output: Path | None) -> None:
    """Write the bill of materials of BUNDLE: CycloneDX 1.6 in JSON, with a model card."""
    from dymoe_runtime.tools.provenance.sbom import bill_of_materials

    _write(bill_of_materials(Bundle.open(bundle)), output)


@click.command("sign", cls=FlagsCommand, examples=("dymoe-bundle sign my.dymoe --key key.pem",))
@click.argument("bundle", type=PATH)
@click.option("--key", type=PATH, required=True, help="A private Ed25519 key in PEM.")
@click.option("-o", "--output", type=PATH, help="The signature. Default: BUNDLE.sig, beside the bundle.")
@BUILDER
@one_sentence
def sign_command(bundle: Path, key: Path, output: Path | None, builder: str | None) -> None:
    """Sign BUNDLE: write its statement, as `attest` makes it, in a DSSE envelope with an Ed25519 signature."""
    from dymoe_runtime.tools.provenance.signature import is_envelope, sign, signature_of

    target = output or signature_of(bundle)
    if os.path.lexists(target) and not is_envelope(target):
        raise DymoeError(f"{target}: is there and no signature; move it away, or choose another place with -o")
    envelope = sign(_statement(Bundle.open(bundle), builder), key)
    with replacing(target) as file:
        file.write(envelope)
    say(f"{target}: signs {bundle}", err=True)


def _statement(bundle: Bundle, builder: str | None) -> dict[str, Any]:
    from dymoe_runtime.tools.provenance.statement import default_builder, statement

    return statement(bundle, builder or default_builder(bundle))


def _write(values: Mapping[str, Any], output: Path | None) -> None:
    text = json.dumps(values, indent=1, allow_nan=False)
    if output is None:
        click.echo(text)
        return
    with replacing(output) as file:
        file.write(f"{text}\n".encode())


COMMANDS = (attest_command, sbom_command, sign_command)

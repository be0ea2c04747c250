"""dymoe-bundle check: gates of a pipeline on quality, size, memory, speed and identity of a bundle."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.policy import OperatingPoint
from dymoe_runtime.cli.flags import EXIT_CODES, FlagsCommand
from dymoe_runtime.console import FiniteRange, Size, one_sentence, print_json, say
from dymoe_runtime.errors import DymoeError, QualityError, importing
from dymoe_runtime.files import read_text, replacing
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.text.tokenizer import Tokenizer

PATH = click.Path(path_type=Path)
EXAMPLES = (
    "dymoe-bundle check my.dymoe --max-kl 0.05 --max-bytes 20MiB --min-tokens-per-s 5",
    "dymoe-bundle check my.dymoe --profile laptop-8gb --max-kl 0.05 --json --junit check.xml",
    "dymoe-bundle check my.dymoe --max-kl 0.1 --reference path/to/checkpoint --text held-out.txt",
)
ABOVE_0 = FiniteRange(0, min_open=True)
# The compiler reads profiles; a runtime may be installed without it.
PROFILES, DEVICE = "dymoe_compile.job.profile", "dymoe_compile.job.device"


@click.command(
    "check",
    cls=FlagsCommand,
    examples=EXAMPLES,
    exit_codes=(*EXIT_CODES[:3], ("3", "a gate failed; the table says which"), *EXIT_CODES[3:]),
)
@click.argument("bundle", type=PATH)
@click.option("--max-kl", type=ABOVE_0, metavar="X", help="The most KL to the original, in nats per token.")
@click.option("--max-bytes", type=Size(), help="The most bytes that are shipped, such as 20GiB.")
@click.option("--min-tokens-per-s", type=ABOVE_0, metavar="X", help="The least speed of decoding on this machine.")
@click.option("--profile", metavar="NAME", help="A device that must have the memory: a shipped name or a .toml file.")
@click.option("--expect", metavar="DIGEST", help="The digest that the bundle must have; this reads all of it.")
@click.option(
    "--point",
    metavar="NAME",
    help="The operating point to check. Default: with --profile that of least KL which fits, else the bundle's.",
)
@click.option("--reference", type=PATH, help="Measure KL anew, on --text, to this checkpoint or bundle.")
@click.option("--text", "texts", multiple=True, metavar="FILE…", help="Texts for --reference; each must pass.")
@click.option("--memory", type=Size(), help="Memory of measured runs. Default: the profile's, else all that is free.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, alone, to stdout.")
@click.option("--junit", type=PATH, metavar="FILE", help="Write the result as the XML of JUnit, too.")
@one_sentence
def check_command(bundle: Path, as_json: bool, junit: Path | None, profile: str | None, **given: Any) -> None:
    """Check BUNDLE against limits; exit with 3 if it is beyond one of them."""
    from dymoe_runtime.tools.bench import decoding_speed
    from dymoe_runtime.tools.evaluate import distances
    from dymoe_runtime.tools.gates import gate
    from dymoe_runtime.tools.gates.check import Limits, check, compiled_quality

    _check_flags(profile, given)
    opened, kernels = Bundle.open(bundle), load_kernels()
    device, point = _device(opened, kernels, profile, given["point"])
    memory = given["memory"] or (device.memory_bytes if device else None)
    reference, known, texts = given["reference"], None, {}
    if reference is None:
        known = compiled_quality(opened, point)
    else:
        texts = _token_ids(opened, given["texts"])
    limits = Limits(given["expect"], given["max_bytes"], given["max_kl"], given["min_tokens_per_s"], device)
    scores = partial(distances, opened, kernels, point.name, texts, reference, memory)
    gates = check(opened, limits, known, scores, partial(decoding_speed, opened, kernels, point.name, memory))
    result = gate.to_json(opened, point.name, profile, gates)
    if junit is not None:
        with replacing(junit) as file:
            file.write(gate.to_junit(result))
    if as_json:
        print_json(result)
    else:
        say(gate.format_gates(gates))
    if failed := gate.failed(gates):
        raise QualityError(f"{bundle}: failed at {', '.join(failed)}; see the table for what was asked and measured")


def _check_flags(profile: str | None, given: dict[str, Any]) -> None:
    """Raise DymoeError where flags do not go together."""
    gates = ("max_kl", "max_bytes", "min_tokens_per_s", "expect")
    if profile is None and all(given[name] is None for name in gates):
        raise DymoeError("nothing to check; give --max-kl, --max-bytes, --min-tokens-per-s, --profile or --expect")
    if (given["reference"] is None) != (not given["texts"]):
        raise DymoeError("--reference and --text go together; give both or neither")
    if given["reference"] is not None and given["max_kl"] is None:
        raise DymoeError("--reference measures KL; give --max-kl, or leave it out")
    if given["expect"] is not None and re.fullmatch("[0-9a-fA-F]{64}", given["expect"]) is None:
        raise DymoeError(
            f"--expect {given['expect']}: not a digest of 64 hexadecimal digits; dymoe-bundle digest prints one"
        )


def _device(bundle: Bundle, kernels: Kernels, name: str | None, wanted: str | None) -> tuple[Any, OperatingPoint]:
    """Return the device of a profile, or None without one, and the operating point to check.

    Raises DymoeError if there is no such profile or point.
    """
    from dymoe_runtime.tools.gates.check import Device

    policy, fitting = bundle.policy, []
    device = None
    if name is not None:
        with importing():
            profiles, devices = importlib.import_module(PROFILES), importlib.import_module(DEVICE)
        profile = profiles.load_profile(name)
        floor = devices.profile_budget(bundle, profile, kernels).floor_bytes
        device = Device(profile.name, profile.memory_bytes, floor)
        fitting = [point for point in policy.points if profiles.fits(point, bundle, profile)]
    if wanted is None:
        return device, min(fitting, key=lambda point: point.kl, default=policy.point(policy.default_point))
    names = [point.name for point in policy.points]
    if wanted not in names:
        raise DymoeError(f"--point {wanted}: no operating point of the bundle; it has {', '.join(names)}")
    return device, policy.point(wanted)


def _token_ids(bundle: Bundle, files: Sequence[str]) -> dict[str, list[int]]:
    """Return the tokens of each text; raise DymoeError if one has fewer than two."""
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    texts = {name: tokenizer.encode(read_text(Path(name), "give text files to --text")) for name in files}
    for name, ids in texts.items():
        bundle.spec.check_ids(ids)
        if len(ids) < 2:
            raise DymoeError(f"{name}: a single token has nothing to score; give longer text to --text")
    return texts


COMMANDS = (check_command,)

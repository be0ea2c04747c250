"""The file in which a machine's rates are a profile to compile and plan for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import replacing
from dymoe_runtime.tools.machine.rates import Rates

SUFFIX = ".toml"


def check_target(path: Path, overwrite: bool) -> None:
    """Raise DymoeError unless a profile can be written to `path`: before something is measured for minutes."""
    if path.suffix != SUFFIX or re.fullmatch(r"[A-Za-z0-9][\w.-]*", path.stem, re.ASCII) is None:
        raise DymoeError(f"--write {path}: expected the name of a profile and .toml, such as my-board.toml")
    if not path.parent.is_dir():
        raise DymoeError(f"--write {path}: {path.parent} is no directory; make it first")
    if os.path.lexists(path) and not overwrite:
        raise DymoeError(f"--write {path}: the file exists; give another name, or --overwrite to replace it")


def write_profile(
    path: Path, rates: Rates, ladder: Sequence[int], memory_bytes: int, kernels: str, overwrite: bool
) -> None:
    """Write a profile with the stem of `path` as its name, whole or not at all; raise DymoeError as `check_target`."""
    check_target(path, overwrite)
    with replacing(path) as file:
        file.write(profile_text(path.stem, rates, ladder, memory_bytes, kernels).encode())


def profile_text(name: str, rates: Rates, ladder: Sequence[int], memory_bytes: int, kernels: str) -> str:
    """Return the TOML text of a profile."""
    return f"""\
# Measured by dymoe-run probe, with {kernels} kernels.
name = "{name}"
ladder = {list(ladder)}
dense_bits = "auto"
memory = "{memory_bytes >> 20}MiB"  # what was available
threads = {rates.threads}
memory_bandwidth = "{_rate(rates.memory_bytes_per_s)}B/s"  # of weights in products
decode_rate = {_table(rates.decode_weights_per_s)}  # weights that a thread multiplies with one token, by their bits
prompt_rate = {_table(rates.prompt_weights_per_s)}  # likewise, with each of many tokens
layer_us = {1e6 * rates.layer_s:.2f}  # of a decoded token in a layer, beside products
expert_us = {1e6 * rates.expert_s:.2f}  # likewise, in an expert
prompt_layer_us = {1e6 * rates.prompt_layer_s:.2f}  # of each token of a prompt in a layer, beside products
prompt_expert_us = {1e6 * rates.prompt_expert_s:.2f}  # likewise, in an expert
disk_bandwidth = "{_rate(rates.disk_bytes_per_s)}B/s"  # past the page cache
disk_latency_us = {1e6 * rates.disk_latency_s:.1f}
"""


def _table(rates: Mapping[int, float]) -> str:
    return "{ " + ", ".join(f'{bits} = "{_rate(rate)}/s"' for bits, rate in sorted(rates.items())) + " }"


def _rate(value: float) -> str:
    """Return a rate in whole millions."""
    return f"{value / 1e6:.0f}M"

"""Device profiles: profiles/<name>.toml."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from dymoe_runtime.bundle.bundle import DENSE, Bundle
from dymoe_runtime.bundle.policy import OperatingPoint
from dymoe_runtime.bundle.tiers import check_ladder
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import read_regular, strict
from dymoe_runtime.process import MAX_THREADS
from dymoe_runtime.tools.machine.rates import Rates
from dymoe_runtime.units import parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Value of dense bits that has them chosen by the KL that fewer bits cost this model.
AUTO = "auto"
REMEDY = "correct it; profiles/ has examples, and dymoe-run probe BUNDLE --write FILE makes one of this machine"
MAX_PROFILE_BYTES = 1 << 20
# Memory that a run on the device is assumed to take before it loads anything. It has a margin, because other releases
# of Python and its libraries take more than the measured ones.
DEVICE_PROCESS_BYTES = 64 << 20


@dataclass(frozen=True)
class Profile:
    """A device to compile for: profiles/<name>.toml.

    All but the rates decides what the compiler makes; the rates decide what it expects of it.
    """

    name: str
    ladder: tuple[int, ...]
    dense_bits: int | str  # bits of every kind of dense weights, or "auto" to measure
    memory_bytes: int  # for the whole process
    rates: Rates | None  # None if the file has none

    def to_json(self) -> dict[str, Any]:
        """Return what decides a bundle, for its provenance."""
        return {
            "name": self.name,
            "ladder": list(self.ladder),
            "dense_bits": self.dense_bits,
            "memory_bytes": self.memory_bytes,
        }


Microseconds = Annotated[float, Meta(ge=0, le=1e6)]


@dataclass(frozen=True)
class _Kept:
    """The keys of a profile's file. Rates are None in one that has none of MEASURED."""

    name: str
    ladder: tuple[int, ...]
    dense_bits: int | str
    memory: int | str
    threads: Annotated[int, Meta(ge=1, le=MAX_THREADS)]
    disk_bandwidth: int | str
    memory_bandwidth: int | str | None
    decode_rate: int | str | dict[str, int | str] | None
    prompt_rate: int | str | dict[str, int | str] | None
    layer_us: Microseconds | None
    disk_latency_us: Microseconds | None
    expert_us: Microseconds | None
    prompt_layer_us: Microseconds | None
    prompt_expert_us: Microseconds | None


# Keys that a profile has all of or none of: without them a plan tells no speed.
MEASURED = ("memory_bandwidth", "decode_rate", "prompt_rate", "layer_us", "disk_latency_us")
# Keys of a table of rates by bits.
TABLE_BITS = tuple(map(str, range(2, 9)))
# Keys that only a measurement tells; a profile from data sheets counts these times among the others.
FINER = ("expert_us", "prompt_layer_us", "prompt_expert_us")


def load_profile(name: str) -> Profile:
    """Return the shipped profile of this name, or the profile in any .toml file.

    Raises DymoeError if there is no such profile, or for an unknown, missing or wrong key.

    >>> load_profile("laptop-8gb").ladder
    (2, 3, 4)
    """
    path = Path(name) if name.endswith(".toml") else _profiles() / f"{name}.toml"
    if not path.exists():
        known = ", ".join(shipped_profiles())
        raise DymoeError(f"{path}: no such profile; shipped are {known}, or give a .toml file")
    data = read_regular(path, "give a shipped profile's name or a readable .toml file", MAX_PROFILE_BYTES)
    try:
        values = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise DymoeError(f"{path}: not valid TOML ({error}); {REMEDY}") from error
    return _profile(values, str(path))


def shipped_profiles() -> list[str]:
    """Return the names of the shipped profiles, sorted."""
    return sorted(file.stem for file in _profiles().glob("*.toml"))


def _profile(values: dict[str, Any], where: str) -> Profile:
    has_rates = any(key in values for key in MEASURED)
    absent: dict[str, Any] = dict.fromkeys(FINER, 0) if has_rates else dict.fromkeys((*MEASURED, *FINER))
    kept = strict(_Kept, {**absent, **values}, where, REMEDY)
    try:
        ladder, memory = check_ladder(kept.ladder), parse_size(str(kept.memory))
        disk, rates = _rate(kept.disk_bandwidth, "disk_bandwidth"), None
        if has_rates:
            rates = Rates(
                threads=kept.threads,
                memory_bytes_per_s=_rate(kept.memory_bandwidth, "memory_bandwidth"),
                decode_weights_per_s=_by_bits(kept.decode_rate, "decode_rate", ladder),
                prompt_weights_per_s=_by_bits(kept.prompt_rate, "prompt_rate", ladder),
                layer_s=float(kept.layer_us or 0) / 1e6,
                disk_bytes_per_s=disk,
                disk_latency_s=float(kept.disk_latency_us or 0) / 1e6,
                expert_s=float(kept.expert_us or 0) / 1e6,
                prompt_layer_s=float(kept.prompt_layer_us or 0) / 1e6,
                prompt_expert_s=float(kept.prompt_expert_us or 0) / 1e6,
            )
    except ValueError as error:
        raise DymoeError(f"{where}: {error}; {REMEDY}") from error
    check_dense_bits(kept.dense_bits, where)
    return Profile(kept.name, ladder, kept.dense_bits, memory, rates)


def _by_bits(value: int | str | dict[str, int | str] | None, key: str, ladder: tuple[int, ...]) -> dict[int, float]:
    """Return rates by the bits of weights, from a table or from one rate for all tiers; raise ValueError as `_rate`."""
    if not isinstance(value, dict):
        return dict.fromkeys(ladder, float(_rate(value, key)))
    if not value or not set(value) <= set(TABLE_BITS):
        raise ValueError(f"'{key}' is a table of {', '.join(value) or 'nothing'}, expected bits of weights, such as 2")
    return {int(bits): float(_rate(rate, key)) for bits, rate in value.items()}


def _rate(value: int | str | None, key: str) -> int:
    """Return a rate such as 2GB/s, of bytes, or 4G/s, of weights; raise ValueError if it is none, or 0."""
    rate = parse_size(str(value).removesuffix("/s"))
    if rate == 0:
        raise ValueError(f"'{key}' is 0, expected more")
    return rate


def fits(point: OperatingPoint, bundle: Bundle, profile: Profile) -> bool:
    """Return whether process, dense weights and all experts at the mean size of `point` fit the profile's memory."""
    return effective_bits_fit(point.effective_bits, bundle, profile)


def effective_bits_fit(bits: float, bundle: Bundle, profile: Profile) -> bool:
    """Return whether all experts fit the profile's memory, with so many effective bits per weight in the mean."""
    whole = bundle.layout.bits_per_weight(bundle.manifest.ladder[-1])
    room = profile.memory_bytes - DEVICE_PROCESS_BYTES - bundle.manifest.files[DENSE].nbytes
    return bundle.expert_bytes() * bits / whole <= room


def check_dense_bits(bits: object, where: str) -> None:
    """Raise DymoeError unless `bits` is 4 to 8, 16 or AUTO; `where` starts its message."""
    if bits not in (4, 5, 6, 7, 8, 16, AUTO):
        raise DymoeError(f"{where}: dense bits are {bits!r}, expected 4 to 8, 16 for bf16, or {AUTO}")


def _profiles() -> Path:
    package = Path(__file__).parent.parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"

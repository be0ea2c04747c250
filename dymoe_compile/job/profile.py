"""Device profiles: profiles/<name>.toml."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymoe_runtime.bundle.tiers import check_ladder
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import strict
from dymoe_runtime.units import parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Value of dense bits that has them chosen by the KL that fewer bits cost this model.
AUTO = "auto"
# Memory that a run on the device is assumed to take before it loads anything. It has a margin, because other releases
# of Python and its libraries take more than the measured ones.
DEVICE_PROCESS_BYTES = 64 << 20


@dataclass(frozen=True)
class Profile:
    """A device to compile for: profiles/<name>.toml."""

    name: str
    ladder: tuple[int, ...]
    dense_bits: int | str  # bits of every kind of dense weights, or "auto" to measure
    memory_bytes: int  # for the whole process
    disk_bytes_per_s: int  # only recorded in the bundle, as `threads` is
    threads: int


def load_profile(name: str) -> Profile:
    """Return the shipped profile of this name, or the profile in any .toml file.

    Raises DymoeError if there is no such profile, or for an unknown, missing or wrong key.

    >>> load_profile("laptop-8gb").ladder
    (2, 3, 4)
    """
    path = Path(name) if name.endswith(".toml") else _profiles() / f"{name}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in _profiles().glob("*.toml")))
        raise DymoeError(f"{path}: no such profile; shipped are {known}, or give a .toml file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DymoeError(f"{path}: not valid TOML ({error})") from error
    except OSError as error:
        raise DymoeError(f"{path}: {error.strerror}; give a shipped profile's name or a readable .toml file") from error
    return _profile(values, str(path))


def _profile(values: dict[str, Any], where: str) -> Profile:
    keys = {"name", "ladder", "dense_bits", "memory", "disk_bandwidth", "threads"}
    if missing := sorted(keys - set(values)):
        raise DymoeError(f"{where}: '{missing[0]}' is missing")
    if unknown := sorted(set(values) - keys):
        raise DymoeError(f"{where}: unknown key '{unknown[0]}'")
    try:
        values["ladder"] = check_ladder(values["ladder"])
        values["memory_bytes"] = parse_size(str(values.pop("memory")))
        values["disk_bytes_per_s"] = parse_size(str(values.pop("disk_bandwidth")).removesuffix("/s"))
    except (ValueError, TypeError) as error:
        raise DymoeError(f"{where}: {error}") from error
    profile: Profile = strict(Profile, values, where)
    if not isinstance(profile.threads, int) or profile.threads < 1:
        raise DymoeError(f"{where}: 'threads' is {profile.threads!r}, expected a whole number of at least 1")
    check_dense_bits(profile.dense_bits, where)
    return profile


def check_dense_bits(bits: object, where: str) -> None:
    """Raise DymoeError unless `bits` is 4 to 8, 16 or AUTO; `where` starts its message."""
    if bits not in (4, 5, 6, 7, 8, 16, AUTO):
        raise DymoeError(f"{where}: dense bits are {bits!r}, expected 4 to 8, 16 for bf16, or {AUTO}")


def _profiles() -> Path:
    package = Path(__file__).parent.parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"

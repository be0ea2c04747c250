"""The machine: device profiles, memory limits, and what this process uses."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import check_ladder, strict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
# Left free under a memory limit that is not ours to fill to the last byte.
MARGIN = 0.03
# In place of a number of dense bits: chosen by what they cost this model.
AUTO = "auto"
_M_MMAP_THRESHOLD = -3  # malloc.h
_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
# The line that begins a mapping in smaps; the file's inode is 0 where there is none.
_MAPPED = re.compile(rb"(?P<begin>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<what>\S+) \S+ \S+ (?P<file>[1-9]\d*)?")


@dataclass(frozen=True)
class Profile:
    """A device to compile for: profiles/<name>.toml."""

    name: str
    ladder: tuple[int, ...]
    dense_bits: int | str  # of every kind, or "auto": measured
    memory_bytes: int  # for the whole process
    disk_bytes_per_s: int  # recorded with the bundle, as threads are; they decide nothing
    threads: int


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or any TOML file; DymoeError names an unknown or missing key."""
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
    if bits not in (4, 5, 6, 7, 8, 16, AUTO):
        raise DymoeError(f"{where}: dense bits are {bits!r}, expected 4 to 8, 16 for bf16, or {AUTO}")


def parse_size(text: str) -> int:
    """Bytes of '4GiB', '500 MB' or '123'; ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError(f"'{text}' is not a size; write it like 4GiB, 500MB or a number of bytes")
    nbytes = float(match[1]) * UNITS[match[2].lower()]
    if nbytes >= 1 << 63:
        raise ValueError(f"'{text[:20]}{'…' * (len(text) > 20)}' is more than there can be")
    return int(nbytes)


def format_size(nbytes: float) -> str:
    """1234567 -> '1.2 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError


def memory_limit() -> int:
    """Bytes that this process may use: its cgroup's limit or what is available, less a margin and what others hold."""
    room = [int(limit * (1 - MARGIN)) - _held_by_others(group) for group, limit in _limited_cgroups()]
    return max(0, min([int(available_memory() * (1 - MARGIN)), *room]))


def imposed_limit() -> int:
    """Bytes that the cgroups of this process let it use just now, less a margin; sys.maxsize where there are none."""
    return int(min(cgroup_limits(), default=sys.maxsize) * (1 - MARGIN))


def available_memory() -> int:
    """Memory that can be had without swapping, what this process already holds included."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 + resident_bytes()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_limits() -> Iterator[int]:
    """Limits of the cgroups that this process is in, versions 1 and 2, up to the root."""
    return (limit for _, limit in _limited_cgroups())


def _limited_cgroups() -> Iterator[tuple[Path, int]]:
    """Each cgroup of this process that has a limit, and the limit."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield from _limits(_CGROUP / "memory", path, ("memory.limit_in_bytes",))
        elif controllers == "":
            # Who exceeds the first is killed, the second is slowed down till it hardly moves.
            yield from _limits(_CGROUP, path, ("memory.max", "memory.high"))


def _limits(root: Path, path: str, files: Sequence[str]) -> Iterator[tuple[Path, int]]:
    folder = root / path.strip("/")
    # Inside a container the path may be the host's, and only the root is visible.
    for place in (folder, *folder.parents):
        for file in files:
            text = "".join(_lines(place / file))
            if text.isdigit():
                yield place, int(text)
        if place == root:
            break


def _held_by_others(group: Path) -> int:
    """Memory in use by the cgroup's other processes that the kernel cannot take back; an estimate."""
    names = ("total_rss", "total_shmem") if (group / "memory.limit_in_bytes").exists() else ("anon", "shmem")
    counts = dict(line.split() for line in _lines(group / "memory.stat"))
    own = next((int(line.split()[1]) << 10 for line in _lines(_STATUS) if line.startswith("RssAnon:")), 0)
    return max(0, sum(int(counts.get(name, 0)) for name in names) - own)


def resident_bytes() -> int:
    """Resident set of this process, by the kernel."""
    fields = "".join(_lines(Path("/proc/self/statm"))).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Largest resident set so far, by the kernel."""
    for line in _lines(_STATUS):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def return_large_blocks() -> None:
    """Have glibc give every freed block from 1 MiB on back to the system, not keep it for later.

    Costs some speed where large blocks come and go, but memory is then what is in use.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def return_freed_memory() -> None:
    """Have glibc give what is freed and kept for later back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def release_code() -> None:
    """Let go of the pages of libraries' code, of which loading them used more than running does; Linux alone.

    What is needed again comes back from the page cache. Not while other threads load or unload libraries.
    """
    try:
        lines = Path("/proc/self/smaps").read_bytes().split(b"\n")  # paths may be in any encoding
    except OSError:
        return
    code, changed = None, False
    for line in lines:
        if header := _MAPPED.match(line):
            code = header if header["what"] == b"r-xp" and header["file"] else None
            changed = False
        elif code is not None and line.startswith((b"Anonymous:", b"Swap:")):
            changed = changed or line.split()[1] != b"0"
        elif code is not None and line.startswith(b"VmFlags:") and not changed:  # the last line of a mapping
            begin, end = (int(code[name], 16) for name in ("begin", "end"))
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def default_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _profiles() -> Path:
    installed = Path(__file__).parent / "profiles"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "profiles"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []

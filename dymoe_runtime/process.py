"""Memory limits, memory use and CPUs of this process."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# Share of a memory limit to leave free; filling one to the last byte is not safe.
MARGIN = 0.03
_M_MMAP_THRESHOLD = -3  # malloc.h
# More threads than any machine has processors; each takes memory.
MAX_THREADS = 1024

_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
# A mapping of a file's code in smaps: its first line, and those that begin with a key. An inode of 0 means no file.
_MAPPED_CODE = re.compile(rb"^(?P<begin>[0-9a-f]+)-(?P<end>[0-9a-f]+) r-xp \S+ \S+ [1-9].*(?:\n[A-Z].*)*", re.MULTILINE)
# Its pages differ from the file.
_CHANGED = re.compile(rb"^(?:Anonymous|Swap): +[1-9]", re.MULTILINE)


def memory_limit() -> int:
    """Return the bytes of memory that this process may use, less a margin; at least 0.

    This is the smallest of the available memory and, for each cgroup of this process that has a limit, the limit less
    what its other processes hold.
    """
    room = [int(limit * (1 - MARGIN)) - _held_by_others(group) for group, limit in _limited_cgroups()]
    return max(0, min([int(available_memory() * (1 - MARGIN)), *room]))


def imposed_limit() -> int:
    """Return the lowest limit of this process's cgroups just now, in bytes, less a margin.

    Returns a number beyond any memory size if no cgroup has a limit.
    """
    return int(min(cgroup_limits(), default=sys.maxsize) * (1 - MARGIN))


def machine_limit() -> int:
    """Return the most bytes this process could ever have: the machine's memory, or a lower cgroup limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *cgroup_limits()])


def available_memory() -> int:
    """Return the bytes that can be had without swapping, including what this process holds already.

    Returns the machine's memory if /proc/meminfo has no estimate.
    """
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 + resident_bytes()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_limits() -> Iterator[int]:
    """Yield the memory limits in bytes of this process's cgroups, versions 1 and 2, up to the root."""
    return (limit for _, limit in _limited_cgroups())


def _limited_cgroups() -> Iterator[tuple[Path, int]]:
    """Yield (folder, limit in bytes) of each cgroup of this process that has a memory limit."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield from _limits(_CGROUP / "memory", path, ("memory.limit_in_bytes",))
        elif controllers == "":
            # Exceeding memory.max kills the process; exceeding memory.high slows it down almost to a halt.
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
    """Estimate the bytes that other processes of the cgroup hold and the kernel cannot reclaim."""
    names = ("total_rss", "total_shmem") if (group / "memory.limit_in_bytes").exists() else ("anon", "shmem")
    counts = dict(line.split() for line in _lines(group / "memory.stat"))
    own = next((int(line.split()[1]) << 10 for line in _lines(_STATUS) if line.startswith("RssAnon:")), 0)
    return max(0, sum(int(counts.get(name, 0)) for name in names) - own)


def resident_bytes() -> int:
    """Return the resident set of this process in bytes, as the kernel counts it.

    Returns the largest resident set so far if /proc/self/statm cannot be read.
    """
    fields = "".join(_lines(Path("/proc/self/statm"))).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the largest resident set of this process so far in bytes, as the kernel counts it."""
    for line in _lines(_STATUS):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def return_large_blocks() -> None:
    """Make glibc return every freed block of 1 MiB or more to the system at once.

    This costs some speed where large blocks come and go, but memory use is then no more than what is allocated.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def return_freed_memory() -> None:
    """Make glibc return to the system the freed memory that it keeps for later."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def release_code() -> None:
    """Drop the pages of libraries' code that this process holds in memory; Linux only.

    Loading a library touches more of its code than running needs. Pages that are needed again come from the page cache.
    Do not call it while other threads load or unload libraries.
    """
    try:
        maps = Path("/proc/self/smaps").read_bytes()  # paths may be in any encoding
    except OSError:
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for code in _MAPPED_CODE.finditer(maps):
            if not _CHANGED.search(code[0]):
                begin, end = (int(code[name], 16) for name in ("begin", "end"))
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def default_threads() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []

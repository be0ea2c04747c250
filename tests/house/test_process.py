"""The memory limits of made-up machines, and what this process holds."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dymoe_runtime.process import (
    MARGIN,
    available_memory,
    cgroup_limits,
    default_threads,
    imposed_limit,
    machine_limit,
    memory_limit,
    peak_resident_bytes,
    resident_bytes,
)

TOTAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
CGROUP = "sys/fs/cgroup"


def set_machine(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    membership: str,
    limits: Mapping[str, str],
    meminfo: str = "MemTotal: 64 kB\nMemAvailable: 1048576 kB\n",
) -> None:
    """A machine whose /proc and /sys are in `root`: with this /proc/self/cgroup, cgroup files and /proc/meminfo.

    The process has two pages, 50 MiB of which no file is behind.
    """
    files = {f"{CGROUP}/{name}": text for name, text in limits.items()} | {
        "proc/self/cgroup": membership,
        "proc/self/statm": "9 2 1",
        "proc/self/status": "VmHWM:\t9 kB\nRssAnon:\t51200 kB\nRssFile:\t8 kB\n",
        "proc/meminfo": meminfo,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    redirect(monkeypatch, root)


def redirect(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Have whoever reads /proc or /sys read below `root`."""
    for name in ("read_text", "exists"):
        real = getattr(Path, name)

        def elsewhere(path: Path, *args: object, real=real) -> object:
            moved = path.parts[1:2] in (("proc",), ("sys",))
            return real(root.joinpath(*path.parts[1:]) if moved else path, *args)

        monkeypatch.setattr(Path, name, elsewhere)


V1 = "12:cpu,cpuacct:/a\n4:memory:/docker/abc\n1:name=systemd:/a\n"
CASES: dict[str, tuple[str, dict[str, str], list[int]]] = {
    "v2, own and parent": (
        "0::/user.slice/app.scope\n",
        {"user.slice/app.scope/memory.max": "700\n", "user.slice/memory.max": "500\n"},
        [700, 500],
    ),
    "v2, the root": ("0::/\n", {"memory.max": "300\n", "memory.high": "200\n"}, [300, 200]),
    "v2, no limit": ("0::/a\n", {"a/memory.max": "max\n", "memory.max": "max\n"}, []),
    "v2, the parent alone limits": ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "9\n"}, [9]),
    "v2, a path of the host": ("0::/kubepods/pod1/c\n", {"memory.max": "400\n"}, [400]),
    "v2, a path above the namespace": ("0::/../../other\n", {"memory.max": "400\n"}, [400]),
    "v2, a path with a colon": ("0::/a:b\n", {"a:b/memory.max": "400\n"}, [400]),
    "v1": (V1, {"memory/docker/abc/memory.limit_in_bytes": "800\n", "docker/abc/memory.max": "1\n"}, [800]),
    "v1 in a container": (V1, {"memory/memory.limit_in_bytes": "600\n"}, [600]),
    "v1, two controllers": ("3:cpu,memory:/x\n", {"memory/x/memory.limit_in_bytes": "5\n"}, [5]),
    "v1, not its controller": ("3:memoryx:/x\n2:cpu:/\n", {"memory/x/memory.limit_in_bytes": "5\n"}, []),
    "v1 and v2": (
        V1 + "0::/s\n",
        {"memory/docker/abc/memory.limit_in_bytes": "800\n", "s/memory.max": "900\n"},
        [800, 900],
    ),
    "nothing": ("", {}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_limits_of_cgroups_are_found(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    membership, files, expected = CASES[case]
    set_machine(monkeypatch, tmp_path, membership, files)
    assert list(cgroup_limits()) == expected


def test_no_limit_above_the_cgroup_root_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(
        monkeypatch, tmp_path, "0::/a\n", {"a/memory.max": "700\n", "memory.max": "600\n", "../memory.max": "5\n"}
    )
    assert list(cgroup_limits()) == [700, 600]


@pytest.mark.parametrize(
    ("limits", "available", "expected"),
    [
        ({"a/memory.max": "700000000"}, 1 << 20, 700_000_000),
        ({"a/memory.max": "700000000", "memory.max": "300000000"}, 1 << 20, 300_000_000),
        ({"a/memory.max": "max"}, 1 << 20, 1 << 30),
        ({"a/memory.max": "70000000000"}, 1 << 20, 1 << 30),
    ],
)
def test_the_smallest_limit_counts_less_a_margin(
    limits: dict[str, str], available: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_machine(monkeypatch, tmp_path, "0::/a\n", limits, f"MemAvailable: {available} kB\n")
    held = 2 * os.sysconf("SC_PAGE_SIZE") if expected == 1 << 30 else 0
    assert memory_limit() == int((expected + held) * (1 - MARGIN))


@pytest.mark.parametrize(
    ("folder", "limit", "stat"),
    [
        ("a", "memory.max", "anon 600000000\nfile 90000000\nshmem 50000000\n"),
        ("memory/a", "memory.limit_in_bytes", "rss 1\ntotal_rss 600000000\ntotal_cache 9\ntotal_shmem 50000000\n"),
    ],
)
def test_what_others_of_the_cgroup_hold_is_not_available(
    folder: str, limit: str, stat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    membership = "4:memory:/a\n" if folder != "a" else "0::/a\n"
    set_machine(monkeypatch, tmp_path, membership, {f"{folder}/{limit}": "900000000", f"{folder}/memory.stat": stat})
    assert memory_limit() == int(900_000_000 * (1 - MARGIN)) - (650_000_000 - (50 << 20))


def test_available_memory_includes_what_this_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, tmp_path, "", {}, "MemFree: 1 kB\nMemAvailable: 1000 kB\n")
    assert available_memory() == 1000 * 1024 + 2 * os.sysconf("SC_PAGE_SIZE")


def test_without_meminfo_all_memory_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, tmp_path, "", {}, "")
    assert available_memory() == TOTAL


def test_where_others_hold_all_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, tmp_path, "0::/a\n", {"a/memory.max": "900000000", "a/memory.stat": "anon 990000000\n"})
    assert memory_limit() == 0


@pytest.mark.parametrize(("limits", "smallest"), [({}, None), ({"a/memory.max": "700000", "memory.high": "90"}, 90)])
def test_an_imposed_limit_is_that_of_cgroups_alone(
    limits: dict[str, str], smallest: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_machine(monkeypatch, tmp_path, "0::/a\n", limits)
    assert imposed_limit() == int((smallest or sys.maxsize) * (1 - MARGIN))
    assert machine_limit() == (smallest or TOTAL)


def test_resident_memory_grows_with_what_is_touched() -> None:
    before = resident_bytes()
    # A mapping of its own: the heap may answer with pages that are resident already.
    with mmap.mmap(-1, 128 << 20) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert resident_bytes() - before > 64 << 20
        assert peak_resident_bytes() >= len(held)


def test_there_is_at_least_one_thread() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)


def test_the_largest_resident_set_is_in_bytes_without_proc_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS counts in bytes what Linux counts in kilobytes."""
    known = peak_resident_bytes()
    redirect(monkeypatch, tmp_path)
    assert abs(peak_resident_bytes() - known) < known / 10
    monkeypatch.setattr(sys, "platform", "darwin")
    assert abs(peak_resident_bytes() * 1024 - known) < known / 10

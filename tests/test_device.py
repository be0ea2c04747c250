"""Sizes, device profiles, and the memory limits of made-up cgroups."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dymoe_runtime import device
from dymoe_runtime.device import (
    MARGIN,
    available_memory,
    cgroup_limits,
    check_dense_bits,
    default_threads,
    format_size,
    load_profile,
    memory_limit,
    parse_size,
    peak_resident_bytes,
    resident_bytes,
)
from dymoe_runtime.errors import DymoeError

PROFILES = sorted((Path(__file__).parent.parent / "profiles").glob("*.toml"))
GOOD = {
    "name": '"board"',
    "ladder": "[2, 3, 4]",
    "dense_bits": "8",
    "memory": '"6GiB"',
    "disk_bandwidth": '"400MB/s"',
    "threads": "4",
}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("123", 123),
        ("123B", 123),
        ("4k", 4000),
        ("4KB", 4000),
        ("4KiB", 4096),
        ("4ki", 4096),
        ("500MB", 500_000_000),
        ("500 MB", 500_000_000),
        (" 2 GiB ", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("0.5kib", 512),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 << 40),
        ("16gb", 16 * 10**9),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


def test_a_size_beyond_all_numbers_is_refused() -> None:
    for text in ("9" * 400, "9" * 5000 + "GiB", "9999999999TiB"):
        with pytest.raises(ValueError, match="more than there can be"):
            parse_size(text)


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "-1GiB", "4PB", "4iB", "4i", "1,5GiB", "4GiB/s", "1e9", "4 G i B", "4GiBs", ".5G", "٤GiB"]
)
def test_what_is_not_a_size_is_refused_with_what_was_given(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert f"'{text}'" in str(caught.value)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1234567, "1.2 MiB"),
        (5 << 30, "5.0 GiB"),
        (3 << 40, "3072.0 GiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_are_written_with_one_digit(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.parametrize("nbytes", [0, 5, 4096, 3 << 20, 7 << 30])
def test_written_sizes_can_be_read(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == nbytes


def write_profile(folder: Path, values: Mapping[str, str]) -> Path:
    path = folder / "board.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_shipped_profiles_load_by_name_and_by_path(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile == load_profile(str(path))
    assert profile.name == path.stem
    assert profile.memory_bytes >= 1 << 30
    assert profile.disk_bytes_per_s >= 10**8
    assert profile.threads >= 1
    assert profile.ladder == tuple(sorted(profile.ladder))


def test_there_are_shipped_profiles() -> None:
    assert len(PROFILES) >= 3


def test_a_profile_is_read_value_by_value(tmp_path: Path) -> None:
    profile = load_profile(str(write_profile(tmp_path, GOOD)))
    assert (profile.name, profile.ladder, profile.dense_bits, profile.threads) == ("board", (2, 3, 4), 8, 4)
    assert (profile.memory_bytes, profile.disk_bytes_per_s) == (6 << 30, 400_000_000)


@pytest.mark.parametrize("value", ['"400MB"', "400000000", '"400000000"'])
def test_a_bandwidth_may_be_any_size(tmp_path: Path, value: str) -> None:
    path = write_profile(tmp_path, {**GOOD, "disk_bandwidth": value})
    assert load_profile(str(path)).disk_bytes_per_s == 400_000_000


@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = write_profile(tmp_path, {k: v for k, v in GOOD.items() if k != key})
    with pytest.raises(DymoeError) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)
    assert f"'{key}'" in str(caught.value)


@pytest.mark.parametrize("key", ["extra", "memory_bytes", "disk_bytes_per_s", "Name"])
def test_an_unknown_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(DymoeError, match=f"unknown key '{key}'"):
        load_profile(str(write_profile(tmp_path, {**GOOD, key: "3"})))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ladder", "[]"),
        ("ladder", "[4, 3]"),
        ("ladder", "[1, 2]"),
        ("ladder", "[2, 9]"),
        ("ladder", "4"),
        ("ladder", '["two"]'),
        ("ladder", "[2.5, 3.5]"),
        ("ladder", '"234"'),
        ("dense_bits", "3"),
        ("dense_bits", "32"),
        ("dense_bits", '"8"'),
        ("threads", "0"),
        ("threads", "1.5"),
        ("threads", '"4"'),
        ("memory", '"much"'),
        ("memory", "-1"),
        ("memory", "true"),
        ("memory", '"5GiB/s"'),
        ("disk_bandwidth", '"fast"'),
        ("disk_bandwidth", '"1GB/min"'),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_file(tmp_path: Path, key: str, value: str) -> None:
    path = write_profile(tmp_path, {**GOOD, key: value})
    with pytest.raises(DymoeError) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"name = ", b"[[", b"name = 'a'\nname = 'b'\n", b"\xff\xfe", b"{}"])
def test_what_is_not_toml_is_said_to_be_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(data)
    with pytest.raises(DymoeError, match="not valid TOML") as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)


def test_an_unknown_profile_is_answered_with_those_shipped() -> None:
    with pytest.raises(DymoeError) as caught:
        load_profile("laptop-8tb")
    assert "laptop-8tb" in str(caught.value)
    assert all(path.stem in str(caught.value) for path in PROFILES)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DymoeError, match=r"absent\.toml: no such profile"):
        load_profile(str(tmp_path / "absent.toml"))


def test_a_folder_in_place_of_a_profile_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(DymoeError, match=r"folder\.toml"):
        load_profile(str(tmp_path / "folder.toml"))


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8, 16])
def test_these_dense_bits_are_good(bits: int) -> None:
    check_dense_bits(bits, "--dense-bits")


@pytest.mark.parametrize("bits", [0, 2, 3, 9, 15, 32, -8])
def test_other_dense_bits_are_refused(bits: int) -> None:
    with pytest.raises(DymoeError, match=rf"--dense-bits.*{bits}"):
        check_dense_bits(bits, "--dense-bits")


# Memory limits


def set_machine(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    membership: str,
    limits: Mapping[str, str],
    meminfo: str = "MemTotal: 64 kB\nMemAvailable: 1048576 kB\n",
) -> None:
    """A machine with these lines of /proc/self/cgroup, cgroup files under `root`, and /proc/meminfo."""
    for name, text in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    proc = {Path("/proc/self/cgroup"): membership, Path("/proc/meminfo"): meminfo, Path("/proc/self/statm"): "9 2 1"}
    real = device._lines

    def lines(path: Path) -> list[str]:
        return proc[path].splitlines() if path in proc else real(path)

    monkeypatch.setattr(device, "_CGROUP", root)
    monkeypatch.setattr(device, "_lines", lines)


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
    (tmp_path / "memory.max").write_text("5\n")
    set_machine(monkeypatch, tmp_path / "cgroup", "0::/a\n", {"a/memory.max": "700\n", "memory.max": "600\n"})
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
def test_what_others_of_the_cgroup_hold_is_not_to_be_had(
    folder: str, limit: str, stat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    membership = "4:memory:/a\n" if folder != "a" else "0::/a\n"
    set_machine(monkeypatch, tmp_path, membership, {f"{folder}/{limit}": "900000000", f"{folder}/memory.stat": stat})
    own = {line.split(":")[0]: line for line in Path("/proc/self/status").read_text().splitlines()}
    anonymous = int(own["RssAnon"].split()[1]) << 10
    assert memory_limit() == pytest.approx(900_000_000 * (1 - MARGIN) - max(0, 650_000_000 - anonymous), abs=5e6)


def test_available_memory_includes_what_this_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, tmp_path, "", {}, "MemFree: 1 kB\nMemAvailable: 1000 kB\n")
    assert available_memory() == 1000 * 1024 + 2 * os.sysconf("SC_PAGE_SIZE")


def test_without_meminfo_all_memory_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, tmp_path, "", {}, "")
    assert available_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
    known = device.peak_resident_bytes()
    monkeypatch.setattr(device, "_STATUS", tmp_path / "none")
    assert abs(device.peak_resident_bytes() - known) < known / 10
    monkeypatch.setattr(sys, "platform", "darwin")
    assert abs(device.peak_resident_bytes() * 1024 - known) < known / 10

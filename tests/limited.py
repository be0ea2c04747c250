"""A command inside limits that the kernel enforces: of memory, its page cache included, and of the disk's speed.

A limit is a cgroup below this process's own: version 1, or 2 where the controller is delegated.
Needs the right to make one, mostly root.

    python tests/limited.py --limit-mb 1964 --disk-mb-s 200 -- dymoe-run BUNDLE --bench
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it cost by the kernel's accounts."""

    code: int  # -1 where it ran out of time
    out: str
    err: str
    seconds: float
    peak_bytes: int  # page cache included, which may fill the limit
    oom_kills: int
    disk_bytes: int  # read by the whole machine meanwhile


def run(
    command: Sequence[str | Path],
    limit_bytes: int = 0,
    cold: bool = True,
    timeout_s: float = 600,
    env: Mapping[str, str] | None = None,
    disk_bytes_per_s: int = 0,
) -> Outcome:
    """Run `command` with at most `limit_bytes` of memory (0: no limit), with an empty page cache if `cold`.

    With `disk_bytes_per_s` it reads no faster from the disk of the current directory.
    """
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    with memory_limit(limit_bytes) as group, disk_limit(disk_bytes_per_s) as slow:
        enter = "".join(f"echo $$ > {place}/cgroup.procs && " for place in (group, slow) if place) + 'exec "$@"'
        disk, started = _disk_bytes(), time.perf_counter()
        process = subprocess.Popen(
            ["sh", "-c", enter, "sh", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=None if env is None else {**os.environ, **env},
        )
        try:
            out, err = process.communicate(timeout=timeout_s)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            code = -1
        seconds = time.perf_counter() - started
        peak, kills = _accounts(group) if group else (0, 0)
        return Outcome(code, out, err, seconds, peak, kills, _disk_bytes() - disk)


def checked(outcome: Outcome) -> Outcome:
    """The same, of a command that did what it should."""
    if outcome.code or outcome.oom_kills:
        raise SystemExit(f"exit code {outcome.code}, {outcome.oom_kills} kills: {outcome.err[-500:]}")
    return outcome


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path | None]:
    """A cgroup whose processes have so much memory together; None for 0."""
    if not limit_bytes:
        yield None
        return
    version, parent = _own_cgroup("memory")
    with _cgroup(parent) as group:
        set_memory_limit(group, limit_bytes)
        if version == 2:
            (group / "memory.swap.max").write_text("0")
        yield group


def set_memory_limit(group: Path, limit_bytes: int) -> None:
    """Of a cgroup that `memory_limit` made; OSError where it is not to be had, with version 1 if more is in use."""
    one = group / "memory.limit_in_bytes"
    (one if one.exists() else group / "memory.max").write_text(str(limit_bytes))


@contextmanager
def disk_limit(bytes_per_s: int, path: Path = Path(".")) -> Iterator[Path | None]:
    """A cgroup whose processes read so much from the disk that holds `path`; None for 0."""
    if not bytes_per_s:
        yield None
        return
    version, parent = _own_cgroup("blkio")
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with _cgroup(parent) as group:
        if version == 1:
            (group / "blkio.throttle.read_bps_device").write_text(f"{number} {bytes_per_s}")
        else:
            (group / "io.max").write_text(f"{number} rbps={bytes_per_s}")
        yield group


@contextmanager
def _cgroup(parent: Path) -> Iterator[Path]:
    group = parent / f"limited-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        for _ in range(50):  # until its last process is gone
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def _own_cgroup(controller: str) -> tuple[int, Path]:
    """The version, and the cgroup of this process that has the controller, by its name in version 1."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    in_two = {"blkio": "io"}.get(controller, controller)
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for _, place, kind, options, *_ in mounts:
            here = Path(place) / path.strip("/")
            if kind == "cgroup" and controller in controllers.split(",") and controller in options.split(","):
                return 1, here
            if kind == "cgroup2" and not controllers and in_two in (here / "cgroup.controllers").read_text().split():
                return 2, here
    raise SystemExit(f"no {controller} controller of cgroups that this process may use")


def _accounts(group: Path) -> tuple[int, int]:
    """Peak bytes, and how often the kernel killed for want of memory."""

    def pairs(name: str) -> dict[str, str]:
        return dict(line.split() for line in (group / name).read_text().splitlines())

    if (group / "memory.max_usage_in_bytes").exists():
        kills = int(pairs("memory.oom_control").get("oom_kill", 0))
        return int((group / "memory.max_usage_in_bytes").read_text()), kills
    peak = group / "memory.peak"
    return int(peak.read_text()) if peak.exists() else 0, int(pairs("memory.events").get("oom_kill", 0))


def _disk_bytes() -> int:
    total = 0
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if Path("/sys/block", fields[2]).exists() and not fields[2].startswith(("loop", "ram", "zram", "dm-")):
            total += 512 * int(fields[5])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mb", type=float, default=0, help="10^6 bytes")
    parser.add_argument("--disk-mb-s", type=float, default=0, help="10^6 bytes per second")
    parser.add_argument("--timeout-s", type=float, default=600)
    parser.add_argument("--warm", action="store_true", help="leave the page cache as it is")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    disk = int(args.disk_mb_s * 1e6)
    outcome = run(command, int(args.limit_mb * 1e6), not args.warm, args.timeout_s, disk_bytes_per_s=disk)
    print(outcome.out, end="")
    print(outcome.err, end="", file=sys.stderr)
    print(json.dumps({k: v for k, v in asdict(outcome).items() if k not in ("out", "err")}), file=sys.stderr)
    sys.exit(outcome.code if 0 <= outcome.code < 128 else 1)


if __name__ == "__main__":
    main()

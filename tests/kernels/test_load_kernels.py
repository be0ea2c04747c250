"""Which kernels there are and which are loaded, and the threads that they use."""

from __future__ import annotations

import os
import sys

import pytest
from kernel_kit import ALL, COMPILED, kernels_of, run_python

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import REFERENCE, available_kernels, load_kernels
from dymoe_runtime.process import default_threads


def test_the_reference_is_the_last_of_those_available() -> None:
    assert available_kernels()[-1] == REFERENCE
    assert available_kernels().count(REFERENCE) == 1


@pytest.mark.parametrize("name", ALL)
def test_kernels_are_loaded_by_name(name: str) -> None:
    kernels = load_kernels(name)
    assert kernels.name == name
    assert kernels.compiled_isa == (name if name in COMPILED else None)
    assert (kernels.reads is not None) == (name in COMPILED)
    assert kernels.threads() == (default_threads() if name in COMPILED else 1)


def test_the_best_kernels_are_loaded_unless_the_environment_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYMOE_ISA", raising=False)
    assert load_kernels().name == available_kernels()[0]
    for name in ALL:
        monkeypatch.setenv("DYMOE_ISA", name)
        assert load_kernels().name == name
    monkeypatch.setenv("DYMOE_ISA", "sparc")
    assert load_kernels(REFERENCE).name == REFERENCE


def test_the_old_name_of_the_reference_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYMOE_ISA", "torch")
    assert load_kernels().name == REFERENCE


def test_an_unknown_name_lists_those_available(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = f"DYMOE_ISA=sparc: .* {', '.join(ALL)}$"
    with pytest.raises(DymoeError, match=expected):
        load_kernels("sparc")
    monkeypatch.setenv("DYMOE_ISA", "sparc")
    with pytest.raises(DymoeError, match=expected):
        load_kernels()


def test_the_environment_of_a_process_chooses_its_kernels() -> None:
    code = "from dymoe_runtime.kernels import load_kernels; print(load_kernels().name)"
    assert run_python(code, DYMOE_ISA=ALL[-1]).strip() == REFERENCE
    assert f"DymoeError: DYMOE_ISA=sparc: not available here; choose one of {', '.join(ALL)}" in run_python(
        code, DYMOE_ISA="sparc"
    )


# Threads


@pytest.mark.parametrize("isa", COMPILED)
def test_kernels_use_as_many_threads_as_they_are_told(isa: str) -> None:
    before = kernels_of(isa).threads()
    try:
        kernels = load_kernels(isa, threads=3)
        assert kernels.threads() == 3
        kernels.set_threads(1)
        assert kernels.threads() == 1
    finally:
        kernels_of(isa).set_threads(before)


FORK = """
import os
import numpy as np
from dymoe_runtime.bundle import tiers
from dymoe_runtime.kernels import load_kernels
kernels = load_kernels(threads=2)
layout = tiers.make_layout({"weight": (512, 2048)}, (4,))
segments = [np.ones(n, np.uint8) for n in layout.segment_bytes]
x = np.ones((3, 2048), np.float32)
y = kernels.linear(layout, 4, segments, x)
child = os.fork()
same = np.array_equal(y, kernels.linear(layout, 4, segments, x)) and kernels.threads() == 2
if child == 0:
    os._exit(0 if same else 1)
print("child", os.waitpid(child, 0)[1], "parent", same)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("isa", COMPILED[:1])
def test_a_forked_child_has_its_own_threads(isa: str) -> None:
    assert "child 0 parent True" in run_python(FORK, DYMOE_ISA=isa)


PIN = """
import os
import numpy as np
from pathlib import Path
from dymoe_runtime.kernels import load_kernels
x, weight = np.ones((4096, 512), np.float32), np.ones(512, np.float32)
kernels = load_kernels(threads=3)
before = {task.name for task in Path("/proc/self/task").iterdir()}
assert kernels.pin_threads()
kernels.norm(x, weight, 1e-5)
workers = {task.name for task in Path("/proc/self/task").iterdir()} - before
print(*[len(os.sched_getaffinity(int(task))) for task in workers], len(os.sched_getaffinity(0)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("isa", COMPILED[:1])
def test_pinned_threads_stay_on_processors_of_their_own(isa: str) -> None:
    """In a process of its own, for what is pinned stays so."""
    assert run_python(PIN, DYMOE_ISA=isa).split() == ["1", "1", str(len(os.sched_getaffinity(0)))]

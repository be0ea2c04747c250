"""Files that change while a run reads them: what is read again is checked again, however it is read and used."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_kit import ALL, kernels_of

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import REFERENCE
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.store import record_reader
from dymoe_runtime.store.arena import min_arena_bytes

TOKENS = 40
CHANGED_AFTER = 20


def in_records(bundle: Bundle, change: Callable[[np.ndarray], None]) -> None:
    """Change the records of each layer in place, uint8 [experts, bytes]."""
    shape = bundle.spec.num_experts, bundle.layout.record_bytes
    for entry in bundle.manifest.layers.values():
        change(np.memmap(bundle.path / entry.file, np.uint8, "r+", entry.data_start, shape))


def flip(bundle: Bundle) -> None:
    def one_bit(records: np.ndarray) -> None:
        records[:, :: bundle.layout.segment_spans[0] // 2] ^= 1

    in_records(bundle, one_bit)


def swap(bundle: Bundle) -> None:
    def turn(records: np.ndarray) -> None:
        records[:] = np.roll(records, 1, axis=0)

    in_records(bundle, turn)


def zero(bundle: Bundle) -> None:
    in_records(bundle, lambda records: records.fill(0))


def swap_files(bundle: Bundle) -> None:
    """Exchange the contents of the layers' files, which keep their identity."""
    contents = [(bundle.path / entry.file).read_bytes() for entry in bundle.manifest.layers.values()]
    for entry, content in zip(bundle.manifest.layers.values(), [*contents[1:], contents[0]], strict=True):
        with open(bundle.path / entry.file, "r+b") as file:
            file.write(content)


def cut(bundle: Bundle) -> None:
    for entry in bundle.manifest.layers.values():
        os.truncate(bundle.path / entry.file, entry.data_start + 5000)


def replace(bundle: Bundle) -> None:
    """Put other files in the place of those that the run has open."""
    for entry in bundle.manifest.layers.values():
        path = bundle.path / entry.file
        path.rename(f"{path}.old")
        path.write_bytes(bytes(path.with_name(f"{path.name}.old").stat().st_size))


def remove(bundle: Bundle) -> None:
    shutil.rmtree(bundle.path)


IN_PLACE = {"checksum mismatch": (flip, swap, swap_files, zero), "bytes are missing": (cut,)}
CASES = [
    *(("prefetched", change, message) for message, changes in IN_PLACE.items() for change in changes),
    *((way, swap, "checksum mismatch") for way in ("direct", "cached", "without overlap", "with threads of Python")),
    *(("direct", change, "") for change in (replace, remove)),
]


def tokens_until_refused(
    bundle: Bundle, options: RunOptions, kernels: Kernels | None, prompts: bool, change: Callable[[], object]
) -> tuple[list[np.ndarray], str]:
    """Logits of one pass after another, and the error that ended them; the files change in between."""
    logits: list[np.ndarray] = []
    with load_model(bundle, options, kernels) as model:
        try:
            for step in range(TOKENS):
                if step == CHANGED_AFTER:
                    change()
                ids = [(37 * step + 11 * i) % 256 for i in range(20 if prompts else 1)]
                if prompts:
                    model.reset()
                logits.append(model.prefill(ids) if prompts else model.decode(ids[0]))
        except DymoeError as error:
            return logits, str(error)
    return logits, ""


@pytest.mark.parametrize("prompts", [False, True], ids=["tokens", "prompts"])
@pytest.mark.parametrize("name", list(dict.fromkeys([ALL[0], REFERENCE])))
@pytest.mark.parametrize(("way", "change", "message"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_experts_that_change_while_they_are_read_again_are_refused(
    way: str,
    change: Callable[[Bundle], None],
    message: str,
    name: str,
    prompts: bool,
    damaged: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No pass gives other logits. Files that are replaced or removed stay as they were for who has them open."""
    if way == "cached":
        monkeypatch.setattr(record_reader, "_direct_works", lambda bundle, name: False)
    if way == "with threads of Python":
        monkeypatch.setattr(type(kernels_of(name)), "reads", None)
    bundle = Bundle.open(damaged)
    options = RunOptions(
        context=128,
        point="3",
        arena_bytes=min_arena_bytes(bundle.layout),
        prefetch=way == "prefetched",
        overlap=way != "without overlap",
    )
    kernels = kernels_of(name)
    whole, none = tokens_until_refused(bundle, options, kernels, prompts, lambda: None)
    found, error = tokens_until_refused(bundle, options, kernels, prompts, lambda: change(bundle))
    assert not none and len(whole) == TOKENS
    assert len(found) >= CHANGED_AFTER and (len(found) < TOKENS if message else len(found) == TOKENS)
    assert all(np.array_equal(a, b) for a, b in zip(found, whole, strict=False))
    assert re.search(message, error) if message else not error
    assert not message or error.startswith(str(damaged / "experts-"))


def test_other_weights_are_read_once_and_checked(damaged: Path) -> None:
    """So that what happens to their files afterwards is nothing to a run, and what happened before is refused."""
    bundle = Bundle.open(damaged)
    options = RunOptions(context=128, tier=4)
    whole, _ = tokens_until_refused(bundle, options, None, False, lambda: None)

    def ruin() -> None:
        for name in bundle.manifest.files:
            if not name.startswith("experts-"):
                (damaged / name).write_bytes(bytes((damaged / name).stat().st_size))
                os.truncate(damaged / name, 0)

    found, error = tokens_until_refused(bundle, options, None, False, ruin)
    assert not error and all(np.array_equal(a, b) for a, b in zip(found, whole, strict=True))
    with pytest.raises(DymoeError, match=r"dense\.safetensors"):
        load_model(bundle, options)

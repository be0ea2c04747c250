"""A server with the library that lets calls fail, and the inputs of its commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.kit import COMPILER, NO_COMPILER, Compile, build_shim
from fuzz.campaign import Server, server
from fuzz.inputs import Inputs as Sound


@dataclass(frozen=True)
class Inputs:
    """A tiny checkpoint, a text, the bundle of both, and a trace of it."""

    server: Server
    compile: Compile
    model: Path
    bundle: Path
    trace: Path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    if COMPILER is None:
        pytest.skip(NO_COMPILER)
    folder = tmp_path_factory.mktemp("faults")
    with server(build_shim(folder)) as made:
        sound = Sound(folder, made)
        model, bundle = sound.checkpoint("plain"), sound.bundle("plain")
        yield Inputs(made, Compile(made, model, sound.text), model, bundle, sound.others["trace.jsonl"])

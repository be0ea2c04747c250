"""The decoder at full precision equals transformers, and decoding equals prefilling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MODEL, tiny_model
from kernel_kit import ALL, kernels_of
from model_kit import VARIANTS

from dymoe_compile.checkpoint.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.checkpoint.original import CheckpointExperts, open_original
from dymoe_runtime.kernels import REFERENCE
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.routing import in_groups
from dymoe_runtime.model.state import SequenceState

transformers = pytest.importorskip("transformers")

# The best kernels and the reference: all others are held against the reference one operation at a time.
KERNELS = list(dict.fromkeys([ALL[0], REFERENCE]))


def decoder_of(path: Path, name: str) -> Decoder:
    """The checkpoint in float32, with attention over whole windows in NumPy."""
    checkpoint = Checkpoint.open(path)
    return Decoder(checkpoint.spec, CheckpointDense(checkpoint), CheckpointExperts(checkpoint), kernels_of(name))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_logits_equal_transformers(name: str, family: str, changes: dict, tmp_path: Path) -> None:
    model = tiny_model(family, **changes)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(1).integers(0, 97, 70)
    check_against(model, tmp_path, ids, name)


def test_shipped_model_equals_transformers() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    check_against(model, MODEL, np.random.default_rng(1).integers(0, 4096, 300), KERNELS[0])


def check_against(model: torch.nn.Module, path: Path, ids: np.ndarray, name: str) -> None:
    """With attention over whole windows by torch, as the compiler runs the original, and by NumPy."""
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    original, decoder = open_original(path, kernels_of(name)), decoder_of(path, name)
    for got in (original.logits(original.hidden(ids)), decoder.logits(decoder.forward(ids))):
        assert np.abs(got - expected).max() <= 1e-3
        assert np.array_equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_decoding_equals_prefilling(name: str, family: str, changes: dict, tmp_path: Path) -> None:
    tiny_model(family, **changes).save_pretrained(tmp_path)
    ids = np.random.default_rng(2).integers(0, 97, 40)
    decoder = decoder_of(tmp_path, name)
    whole = decoder.logits(decoder.forward(ids))
    state = SequenceState(decoder.spec, 40, 32)
    pieces = [ids[:11], ids[11:30], *in_groups(ids[30:], 1)]
    stepwise = np.concatenate([decoder.logits(decoder.forward(piece, state)) for piece in pieces])
    assert state.length == 40
    state = SequenceState(decoder.spec, 40, 32)
    pieces = in_groups(ids, 23)
    grouped = np.concatenate([decoder.logits(decoder.prefill(piece, state, group=8)) for piece in pieces])
    assert state.length == 40
    assert np.abs(whole - stepwise).max() <= 1e-4
    assert np.abs(whole - grouped).max() <= 1e-4

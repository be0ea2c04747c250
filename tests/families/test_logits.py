"""Every family against transformers, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families.cases import CASES
from families.harness import PROMPT, Case, difference, random_model
from kernel_kit import ALL, kernels_of
from safetensors.torch import load_file, save_file

from dymoe_compile.checkpoint.original import open_original
from dymoe_compile.families import supported
from dymoe_runtime.kernels import REFERENCE
from dymoe_runtime.model.state import SequenceState

KERNELS = list(dict.fromkeys([ALL[0], REFERENCE]))


def test_every_family_has_a_case() -> None:
    others = {"mixtral", "olmoe", "qwen3_moe"}  # tests/model/test_decoder.py has theirs
    assert {case.family for case in CASES} | others == set(supported())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_equal_transformers(case: Case, name: str, tmp_path: Path) -> None:
    """A prompt, then single tokens."""
    most, agreed = difference(case, tmp_path, kernels_of(name))
    assert most <= 1e-3 and agreed == 1.0


@pytest.mark.parametrize("case", list({case.family: case for case in reversed(CASES)}.values()), ids=str)
def test_a_prompt_in_chunks_equals_a_whole_one(case: Case, tmp_path: Path) -> None:
    random_model(case).save_pretrained(tmp_path)
    decoder, ids = open_original(tmp_path, kernels_of(ALL[0])).decoder, np.arange(PROMPT)
    states = SequenceState(decoder.spec, PROMPT, 32), SequenceState(decoder.spec, PROMPT, 32)
    whole, chunks = decoder.forward(ids, states[0]), decoder.prefill(ids, states[1], group=8)
    assert np.abs(decoder.logits(whole) - decoder.logits(chunks)).max() <= 1e-3


# Of each group one, and those whose heads are under other names.
HEADS = ("gemma4", "gpt_oss", "llama4", "qwen3_5_moe", "qwen3_vl_moe", "qwen3_omni_moe")


@pytest.mark.parametrize("own", [True, False], ids=["own", "equal"])
@pytest.mark.parametrize("family", HEADS)
def test_a_head_beside_a_tied_configuration_is_that_of_transformers(family: str, own: bool, tmp_path: Path) -> None:
    """It is used if it differs from the embedding, whatever config.json says."""
    case = next(case for case in CASES if case.family == family)
    model = random_model(case)
    model.save_pretrained(tmp_path)
    with_head(tmp_path, own)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = np.arange(PROMPT)
    with torch.no_grad():
        expected = case.logits(loaded, torch.from_numpy(ids[None]))[0].numpy()
    original = open_original(tmp_path, kernels_of(ALL[0]))
    assert original.decoder.spec.tie_embeddings != own
    assert np.abs(original.logits(original.hidden(ids)) - expected).max() <= 1e-3


def with_head(directory: Path, own: bool) -> None:
    """Have a checkpoint hold a head, and its config.json say that there is none."""
    config, weights = directory / "config.json", directory / "model.safetensors"
    values = json.loads(config.read_text())
    for part in (values, values.get("thinker_config", {}), values.get("text_config", {})):
        part["tie_word_embeddings"] = True
    config.write_text(json.dumps(values))
    state = load_file(weights)
    embed = next(tensor for name, tensor in state.items() if name.endswith("embed_tokens.weight"))
    head = next((name for name in state if name.endswith("lm_head.weight")), "lm_head.weight")
    state[head] = embed.flip(0).contiguous() if own else embed.clone()
    save_file(state, weights, metadata={"format": "pt"})

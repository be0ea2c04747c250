"""Checkpoints in all the layouts that users have, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compile_kit import without_stages
from helpers import assert_one_sentence, compile_cli, save_tiny, tiny_model
from safetensors.torch import load_file, save_file

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.checkpoint.original import open_original
from dymoe_compile.families import Config, family_of, rope_of, supported
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.spec import ExpertKey

FAMILIES = supported()


def test_the_three_families_are_supported() -> None:
    assert {"mixtral", "olmoe", "qwen3_moe"} <= set(FAMILIES)


def stack_experts(directory: Path, family: str) -> None:
    """Rewrite a checkpoint to the stacked layout: gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    model = tiny_model(family, vocab_size=256)
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    assert any("gate_up_proj" in name for name in state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_experts_read_as_separate_ones(family: str, tmp_path: Path) -> None:
    separate = Checkpoint.open(save_tiny(tmp_path / "separate", family))
    stack_experts(save_tiny(tmp_path / "stacked", family), family)
    stacked = Checkpoint.open(tmp_path / "stacked")
    for expert in range(6):
        a, b = (c.expert(ExpertKey(1, expert)) for c in (separate, stacked))
        assert all(torch.equal(a[name], b[name]) for name in ("gate", "up", "down"))


@pytest.mark.parametrize("shard_size", ["20KB", "60KB"])
def test_shards_read_as_one_file(shard_size: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size=shard_size)
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    one, many = (Checkpoint.open(tmp_path / name) for name in ("one", "many"))
    for name in one.spec.tensor_shapes():
        assert torch.equal(one.tensor(name), many.tensor(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_float_type_is_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("olmoe").to(dtype).save_pretrained(tmp_path)
    # Loaded anew, because a change of type rounds transformers' rotary tables too.
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = np.arange(20)
    original = open_original(tmp_path, load_kernels())
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[None])).logits[0].numpy()
    assert np.abs(original.logits(original.hidden(ids)) - expected).max() < 1e-3


def test_configurations_of_older_transformers_are_understood(tmp_path: Path) -> None:
    """rope_theta and rope_scaling at the top level, num_experts by its old name."""
    new = {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
        }
    }
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}}
    assert rope_of(Config({"max_position_embeddings": 128, **new})) == rope_of(
        Config({"max_position_embeddings": 128, **old})
    )
    save_tiny(tmp_path, "qwen3_moe")
    values = json.loads((tmp_path / "config.json").read_text())
    before = family_of(values).spec(Config(values))
    values["num_experts"] = values.pop("num_local_experts", None) or values["num_experts"]
    assert family_of(values).spec(Config(values)) == before


def test_only_one_tensor_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack_experts(save_tiny(tmp_path, "mixtral"), "mixtral")
    checkpoint = Checkpoint.open(tmp_path)
    sizes = []
    original = np.empty
    monkeypatch.setattr(np, "empty", lambda size, *dtype: sizes.append(size) or original(size, *dtype))
    checkpoint.expert(ExpertKey(0, 3))
    assert max(sizes) == 4 * 2 * 40 * 48


def rewrite_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def rewrite_tensor(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    path = directory / "model.safetensors"
    state = load_file(path)
    changed = change(state.pop(name))
    if changed is not None:
        state[name] = changed
    save_file(state, path, metadata={"format": "pt"})


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = value
        return tensor

    return change


DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"


def add_bias(directory: Path) -> None:
    path = directory / "model.safetensors"
    state = load_file(path) | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}
    save_file(state, path, metadata={"format": "pt"})


def overlap(directory: Path) -> None:
    """lm_head points to the bytes of the embedding."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


BAD_CHECKPOINTS: list[tuple[str, Callable[[Path], object], tuple[str, ...]]] = [
    ("no model_type", lambda d: rewrite_config(d, model_type=None), ("model_type", *FAMILIES)),
    ("unknown family", lambda d: rewrite_config(d, model_type="mamba"), ("mamba", *FAMILIES)),
    ("not a MoE", lambda d: rewrite_config(d, num_local_experts=0, num_experts=0), ("MoE",)),
    ("a dense family", lambda d: rewrite_config(d, model_type="llama"), ("llama", *FAMILIES)),
    ("no routed layer", lambda d: rewrite_config(d, mlp_only_layers=[0, 1, 2]), ("MoE",)),
    ("key missing", lambda d: rewrite_config(d, hidden_size=None), ("hidden_size",)),
    ("key of a wrong type", lambda d: rewrite_config(d, hidden_size="48"), ("hidden_size",)),
    ("contradictory width", lambda d: rewrite_config(d, moe_intermediate_size=44), ("shape", "config.json")),
    ("contradictory layers", lambda d: rewrite_config(d, num_hidden_layers=4), ("model.layers.3", "missing")),
    (
        "too few experts",
        lambda d: rewrite_config(d, num_local_experts=8, num_experts=8),
        ("[6, 48]", "[8, 48]", "config.json"),
    ),
    ("top-k above experts", lambda d: rewrite_config(d, num_experts_per_tok=7), ("num_experts_per_tok",)),
    ("unknown rope", lambda d: rewrite_config(d, rope_parameters={"rope_type": "longrope"}), ("longrope",)),
    ("unknown activation", lambda d: rewrite_config(d, hidden_act="relu9"), ("relu9",)),
    ("fewer layers than there are", lambda d: rewrite_config(d, num_hidden_layers=2), ("model.layers.2", "no place")),
    ("no bias where there is one", add_bias, ("q_proj.bias", "no place")),
    ("absurd number of layers", lambda d: rewrite_config(d, num_hidden_layers=10**7), ("num_hidden_layers",)),
    ("negative epsilon", lambda d: rewrite_config(d, rms_norm_eps=-1.0), ("rms_norm_eps",)),
    ("NaN epsilon", lambda d: rewrite_config(d, rms_norm_eps=float("nan")), ("rms_norm_eps",)),
    ("text for a boolean", lambda d: rewrite_config(d, tie_word_embeddings="no"), ("tie_word_embeddings",)),
    ("negative window", lambda d: rewrite_config(d, use_sliding_window=True, sliding_window=-3), ("sliding_window",)),
    ("odd end of text", lambda d: rewrite_config(d, eos_token_id=["a"]), ("eos_token_id",)),
    ("list for an activation", lambda d: rewrite_config(d, hidden_act=["silu"]), ("hidden_act",)),
    ("text for a rope", lambda d: rewrite_config(d, rope_parameters="abc"), ("rope_parameters",)),
    ("zero theta", lambda d: rewrite_config(d, rope_parameters={"rope_theta": 0}), ("rope_theta",)),
    (
        "zero rope factor",
        lambda d: rewrite_config(d, rope_parameters={"rope_type": "linear", "factor": 0}),
        ("factor",),
    ),
    ("context of one", lambda d: rewrite_config(d, max_position_embeddings=1), ("max_position_embeddings",)),
    ("deeply nested config", lambda d: (d / "config.json").write_text("[" * 100_000), ("config.json", "JSON")),
    ("overlapping tensors", overlap, ("overlaps",)),
    ("weights beyond float32", lambda d: rewrite_tensor(d, DOWN, lambda t: t * 1e38), ("layer 1", "not finite")),
    ("config not JSON", lambda d: (d / "config.json").write_text("{"), ("config.json", "JSON")),
    ("config missing", lambda d: (d / "config.json").unlink(), ("config.json",)),
    ("weights missing", lambda d: (d / "model.safetensors").unlink(), ("model.safetensors",)),
    ("NaN weight", lambda d: rewrite_tensor(d, DOWN, with_value(float("nan"))), (DOWN, "NaN")),
    ("Inf weight", lambda d: rewrite_tensor(d, "lm_head.weight", with_value(float("inf"))), ("lm_head", "Inf")),
    ("integer weight", lambda d: rewrite_tensor(d, DOWN, lambda t: t.to(torch.uint8)), (DOWN, "U8")),
    ("tensor missing", lambda d: rewrite_tensor(d, DOWN, lambda t: None), (DOWN, "missing")),
    ("truncated", lambda d: truncate(d / "model.safetensors", 1000), ("truncated",)),
    ("cut in the header", lambda d: truncate(d / "model.safetensors", 10**9), ("model.safetensors",)),
    ("garbage header", lambda d: (d / "model.safetensors").write_bytes(b"\x09" + bytes(7) + b"{garbage}"), ("header",)),
    ("no tokenizer", lambda d: (d / "tokenizer.json").unlink(), ("tokenizer.json",)),
    ("tokenizer not JSON", lambda d: (d / "tokenizer.json").write_text("["), ("tokenizer.json",)),
]


def truncate(path: Path, by: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: max(4, len(data) - by)])


@pytest.mark.parametrize(
    ("harm", "words"), [case[1:] for case in BAD_CHECKPOINTS], ids=[case[0] for case in BAD_CHECKPOINTS]
)
def test_a_bad_checkpoint_gets_one_sentence(
    harm: Callable[[Path], object], words: tuple[str, ...], tmp_path: Path, calibration_text: Path
) -> None:
    model = save_tiny(tmp_path / "model", "qwen3_moe")
    harm(model)
    outcome = compile_cli(model, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    assert_one_sentence(without_stages(outcome), *words)
    assert not (tmp_path / "out.dymoe").exists()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="60KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    assert_one_sentence(compile_cli(tmp_path / "model", "-o", tmp_path / "out.dymoe"), shard.name, "missing")


@pytest.mark.parametrize("shard", [None, 3, "../elsewhere.safetensors", "."])
def test_an_index_that_points_elsewhere_is_refused(shard: object, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="60KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = shard
    index.write_text(json.dumps(values))
    assert_one_sentence(compile_cli(tmp_path / "model", "-o", tmp_path / "out.dymoe"), "index.json", "lm_head")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="60KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    truncate(shard, 100)
    assert_one_sentence(compile_cli(tmp_path / "model", "-o", tmp_path / "out.dymoe"), shard.name, "truncated")


def test_no_such_path(tmp_path: Path) -> None:
    assert_one_sentence(compile_cli(tmp_path / "nowhere", "-o", tmp_path / "out.dymoe"), "nowhere", "no such")
    (tmp_path / "file").write_text("x")
    assert_one_sentence(compile_cli(tmp_path / "file", "-o", tmp_path / "out.dymoe"), "file", "not a directory")

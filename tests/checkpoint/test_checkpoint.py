"""Checkpoints in all the layouts that users have, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compile_kit import without_stages
from helpers import assert_one_sentence, compile_cli, save_tiny, tiny_model
from safetensors.torch import load_file, save_file

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.checkpoint.directory import TensorFiles, read_config
from dymoe_compile.checkpoint.original import open_original
from dymoe_compile.checkpoint.tensors import CheckpointTensors
from dymoe_compile.families import family_of, supported
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.names import Stacked
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.spec import ExpertKey

FAMILIES = ("mixtral", "olmoe", "qwen3_moe")  # those that `helpers.tiny_model` makes


def test_families_are_supported_by_their_file_names() -> None:
    assert set(FAMILIES) <= set(supported())


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
    ropes = [rope_of(Config({"max_position_embeddings": 128, **values}), 16) for values in (new, old)]
    assert ropes[0] == ropes[1]
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
    ("unknown family", lambda d: rewrite_config(d, model_type="mamba"), ("mamba", "--supported")),
    ("not a MoE", lambda d: rewrite_config(d, num_local_experts=0, num_experts=0), ("MoE",)),
    ("a dense family", lambda d: rewrite_config(d, model_type="llama"), ("llama", "--supported")),
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
    ("unknown rope", lambda d: rewrite_config(d, rope_parameters={"rope_type": "xpos"}), ("xpos",)),
    ("no factors", lambda d: rewrite_config(d, rope_parameters={"rope_type": "longrope"}), ("short_factor",)),
    (
        "too few factors",
        lambda d: rewrite_config(d, rope_parameters={"rope_type": "longrope", "short_factor": [1.0]}),
        ("short_factor", "8 numbers"),
    ),
    ("unknown activation", lambda d: rewrite_config(d, hidden_act="relu9"), ("relu9",)),
    ("fewer layers than there are", lambda d: rewrite_config(d, num_hidden_layers=2), ("model.layers.2", "no place")),
    ("no bias where there is one", add_bias, ("q_proj.bias", "no place")),
    ("absurd number of layers", lambda d: rewrite_config(d, num_hidden_layers=10**7), ("num_hidden_layers",)),
    ("negative epsilon", lambda d: rewrite_config(d, rms_norm_eps=-1.0), ("rms_norm_eps",)),
    ("NaN epsilon", lambda d: rewrite_config(d, rms_norm_eps=float("nan")), ("config.json", "NaN")),
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
    ("weights beyond float32", lambda d: rewrite_tensor(d, DOWN, lambda t: t * 1e38), ("expert 1.", "not finite")),
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


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def rewrite_state(directory: Path, change: Change) -> None:
    """Rewrite the tensors of a checkpoint."""
    path = directory / "model.safetensors"
    state = change({name: tensor.clone() for name, tensor in load_file(path).items()})
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})


def renamed(rename: Callable[[str], str]) -> Change:
    return lambda state: {rename(name): tensor for name, tensor in state.items()}


def wrap_config(directory: Path, *outer: str) -> None:
    """Put the configuration of a model into that of one with several modalities."""
    path = directory / "config.json"
    values = json.loads(path.read_text())
    for name in reversed(outer):
        values = {"model_type": "something", name: values}
    path.write_text(json.dumps(values))


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    """Both checkpoints hold the same model."""
    assert a.spec == b.spec
    for name in a.spec.tensor_shapes():
        assert torch.equal(a.tensor(name), b.tensor(name)), name
    for layer in a.spec.moe_layers:
        for expert in range(a.spec.num_experts):
            theirs = b.expert(ExpertKey(layer, expert))
            for name, tensor in a.expert(ExpertKey(layer, expert)).items():
                assert torch.equal(tensor, theirs[name])


PREFIXES = [
    ("model.language_model.", "lm_head.", ("text_config",)),
    ("language_model.model.", "language_model.lm_head.", ("text_config",)),
    ("thinker.model.", "thinker.lm_head.", ("thinker_config", "text_config")),
    ("language_model.", "lm_head.", ("llm_config",)),
    ("backbone.", "lm_head.", ()),
    ("", "lm_head.", ()),
    ("model.", "model.lm_head.", ()),
]


@pytest.mark.parametrize(("model", "head", "outer"), PREFIXES, ids=[prefix[0] for prefix in PREFIXES])
def test_the_language_model_may_be_a_part_of_another(
    model: str, head: str, outer: tuple[str, ...], tmp_path: Path
) -> None:
    usual = Checkpoint.open(save_tiny(tmp_path / "usual", "qwen3_moe", tokenizer=False))
    save_tiny(tmp_path / "part", "qwen3_moe", tokenizer=False)
    rewrite_state(
        tmp_path / "part",
        renamed(lambda name: name.replace("lm_head.", head) if "lm_head" in name else name.replace("model.", model, 1)),
    )
    wrap_config(tmp_path / "part", *outer)
    assert_same(usual, Checkpoint.open(tmp_path / "part"))


LEFT_OUT = {
    "vision": ["visual.blocks.0.attn.qkv.weight", "model.vision_tower.layers.0.mlp.fc1.weight", "model.image_newline"],
    "audio": ["audio_tower.conv1.weight", "model.embed_audio.embedding_projection.weight"],
    "speech output": ["talker.model.layers.0.mlp.gate.weight", "code2wav.decoder.0.conv.weight"],
    "prediction of further tokens": [
        *("mtp.layers.0.mlp.gate.weight", "model.mtp.norm.weight", "model.mtp_block.0.mlp.gate.weight"),
        *("model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.gate_proj.weight"),
    ],
    "tables of rotary embeddings": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"],
    "scales of activations": [
        *("model.layers.0.self_attn.q_proj.input_scale", "model.layers.0.mlp.experts.0.up_proj.activation_scale"),
        "model.layers.0.self_attn.q_proj.input_global_scale",
    ],
    "scales of the KV cache": ["model.layers.0.self_attn.k_proj.k_scale", "model.layers.0.self_attn.v_scale"],
}


def test_what_the_language_model_does_without_is_counted(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    assert Checkpoint.open(tmp_path).left_out == {}
    names = [name for kind in LEFT_OUT.values() for name in kind]
    rewrite_state(tmp_path, lambda state: {**state, **{name: torch.ones(3) for name in names}})
    assert Checkpoint.open(tmp_path).left_out == {kind: len(names) for kind, names in LEFT_OUT.items()}


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_positions.weight",
        "score.weight",
        "lm_head.bias",
        "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.mlp.experts.0.gate_proj.weight_scale",
        "model.layers.0.visual.weight",
        "model.layers.0.mlp.experts.6.up_proj.weight",
        "decoder.layers.0.weight",
    ],
)
def test_a_tensor_without_a_place_is_refused_wherever_it_is(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    rewrite_state(tmp_path, lambda state: {**state, name: torch.zeros(3)})
    with pytest.raises(DymoeError, match=f"tensor {re.escape(name)} has no place"):
        Checkpoint.open(tmp_path)


def test_layers_after_the_own_ones_are_left_out_if_config_says_what_they_are(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    rewrite_config(tmp_path, num_hidden_layers=2, num_nextn_predict_layers=1)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.spec.num_layers == 2 and list(checkpoint.left_out) == ["prediction of further tokens"]


@pytest.mark.parametrize("own", [False, True])
def test_a_tied_head_that_is_stored_is_used_if_it_differs(own: bool, tmp_path: Path) -> None:
    """As transformers does it."""
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    rewrite_config(tmp_path, tie_word_embeddings=True)
    if not own:
        rewrite_state(tmp_path, lambda state: {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()})
    head = load_file(tmp_path / "model.safetensors")["lm_head.weight"].clone()
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.spec.tie_embeddings != own
    assert checkpoint.left_out == ({} if own else {"output head equal to the embedding": 1})
    if own:
        assert torch.equal(checkpoint.tensor("lm_head"), head)


def test_rows_that_pad_the_vocabulary_are_cut(tmp_path: Path) -> None:
    usual = Checkpoint.open(save_tiny(tmp_path / "usual", "qwen3_moe", tokenizer=False))
    save_tiny(tmp_path / "padded", "qwen3_moe", tokenizer=False)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    rewrite_state(
        tmp_path / "padded",
        lambda state: {**state, **{name: torch.cat([state[name], torch.ones(5, 48)]) for name in names}},
    )
    assert_same(usual, Checkpoint.open(tmp_path / "padded"))


def test_numbers_of_64_bits_are_read(tmp_path: Path) -> None:
    usual = Checkpoint.open(save_tiny(tmp_path / "usual", "qwen3_moe", tokenizer=False))
    save_tiny(tmp_path / "f64", "qwen3_moe", tokenizer=False)
    rewrite_state(tmp_path / "f64", lambda state: {name: tensor.double() for name, tensor in state.items()})
    assert_same(usual, Checkpoint.open(tmp_path / "f64"))


def stacked_checkpoint(directory: Path, transposed: bool, interleaved: bool, width: int) -> dict[str, torch.Tensor]:
    """A checkpoint whose experts are stacked, and have biases; return the tensors of all experts of layer 1."""
    save_tiny(directory, "qwen3_moe", tokenizer=False, moe_intermediate_size=width)
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (6, width, 48), "up": (6, width, 48), "down": (6, 48, width)}
    tensors: dict[str, torch.Tensor] = {}

    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = {name: tensor for name, tensor in state.items() if ".experts." not in name}
        for layer in range(3):
            for name, shape in shapes.items():
                tensors[name] = torch.randn(shape, generator=generator)
                tensors[f"{name}_bias"] = torch.randn(shape[:2], generator=generator)
            for end in ("", "_bias"):
                halves = tensors[f"gate{end}"], tensors[f"up{end}"]
                gate_up = torch.stack(halves, 2).flatten(1, 2) if interleaved else torch.cat(halves, 1)
                for name, tensor in (("gate_up", gate_up), ("down", tensors[f"down{end}"])):
                    turned = tensor.transpose(1, 2) if transposed and not end else tensor
                    state[f"model.layers.{layer}.mlp.experts.{name}_proj{end}"] = turned
            if layer == 1:
                expected.update(tensors)
        return state

    expected: dict[str, torch.Tensor] = {}
    rewrite_state(directory, change)
    return expected


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("width", [24, 48, 40])  # the first two have a square matrix among those of an expert
def test_stacks_are_read_in_every_arrangement(
    width: int, declared: bool, stored: bool, interleaved: bool, tmp_path: Path
) -> None:
    expected = stacked_checkpoint(tmp_path, stored, interleaved, width)
    values = read_config(tmp_path)
    spec = family_of(values).spec(Config(values))
    layers = [replace(layer, feed_forward=replace(spec.moe, biases=True)) for layer in spec.layers]
    experts = "model.layers.{layer}.mlp.experts."
    tensors = [(f"{experts}{name}",) for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")]
    stack = Stacked(*tensors, transposed=declared, interleaved=interleaved)
    names = replace(family_of(values).names(spec), expert={}, stacked=stack)
    checkpoint = Checkpoint(CheckpointTensors(TensorFiles(tmp_path), replace(spec, layers=tuple(layers)), names))
    for expert in range(6):
        got = checkpoint.expert(ExpertKey(1, expert))
        assert set(got) == set(expected)
        assert all(torch.equal(got[name], expected[name][expert]) for name in expected)


def split(directory: Path, *names: str) -> None:
    """Cut the only file of a checkpoint into several."""
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for i, name in enumerate(names):
        save_file({key: state[key].clone() for key in sorted(state)[i :: len(names)]}, directory / name)


SHARDS = [
    ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ("model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"),
    ("model-1-of-3.safetensors", "model-2-of-3.safetensors", "model-3-of-3.safetensors"),
    ("weights.safetensors",),
]


@pytest.mark.parametrize("names", SHARDS, ids=[names[0] for names in SHARDS])
def test_files_without_an_index_are_read(names: tuple[str, ...], tmp_path: Path) -> None:
    usual = Checkpoint.open(save_tiny(tmp_path / "usual", "qwen3_moe", tokenizer=False))
    split(save_tiny(tmp_path / "split", "qwen3_moe", tokenizer=False), *names)
    assert_same(usual, Checkpoint.open(tmp_path / "split"))


WITHOUT_WEIGHTS: list[tuple[tuple[str, ...], str]] = [
    (("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"), "shard 2 of 3 is missing"),
    (("a.safetensors", "b.safetensors"), "which says which of the 2 .safetensors files"),
    (("model-Q4_K_M.gguf",), "GGUF files are quantized already: give the checkpoint that they were made from"),
    (("pytorch_model.bin",), "convert it to safetensors first"),
    ((), "download the checkpoint again"),
]


@pytest.mark.parametrize(("names", "words"), WITHOUT_WEIGHTS, ids=[words for _, words in WITHOUT_WEIGHTS])
def test_a_directory_without_all_weights_is_told_what_it_lacks(
    names: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    (tmp_path / "model.safetensors").unlink()
    for name in names:
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(DymoeError, match=re.escape(words)):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("overlay", ["model-overlay.safetensors", "added-overlay.safetensors"])
def test_the_index_says_which_of_two_tensors_counts(overlay: str, tmp_path: Path) -> None:
    """Whatever the order of the names of their files is."""
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    shard = "model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / shard)
    old = load_file(tmp_path / shard)
    new = {name: tensor + 1 for name, tensor in old.items()}
    save_file(new, tmp_path / overlay)
    where = {name: shard if "lm_head" in name else overlay for name in old}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.tensor("embed"), new["model.embed_tokens.weight"])
    assert torch.equal(checkpoint.tensor("lm_head"), old["lm_head.weight"])


def test_a_tensor_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    split(tmp_path, *SHARDS[0])
    state = load_file(tmp_path / SHARDS[0][0])
    more = {**load_file(tmp_path / SHARDS[0][1]), **dict([next(iter(state.items()))])}
    save_file({name: tensor.clone() for name, tensor in more.items()}, tmp_path / SHARDS[0][1])
    with pytest.raises(DymoeError, match=r"is in model-00001-of-00002.safetensors, too"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("named", [True, False], ids=["the index names it", "the index leaves it out"])
def test_tensors_of_named_shards_are_those_of_transformers(named: bool, tmp_path: Path) -> None:
    """A shard may hold one that the index does not name; a file that it does not name counts for nothing."""
    transformers = pytest.importorskip("transformers")
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    head = {"lm_head.weight": state.pop("lm_head.weight")}
    save_file(state, tmp_path / first, metadata={"format": "pt"})
    save_file({**head, "model.norm.weight": state["model.norm.weight"]}, tmp_path / second, metadata={"format": "pt"})
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "a.safetensors")
    where = {name: first for name in state} | {"model.norm.weight": second}
    where |= {"lm_head.weight": second} if named else {}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    checkpoint, theirs = Checkpoint.open(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(checkpoint.tensor("lm_head"), theirs.lm_head.weight)
    assert torch.equal(checkpoint.tensor("embed"), theirs.model.embed_tokens.weight)
    assert torch.equal(checkpoint.tensor("norm"), theirs.model.norm.weight)


def test_a_shard_without_what_the_index_says_is_refused_although_another_has_it(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    split(tmp_path, *SHARDS[0])
    where = {name: shard for shard in SHARDS[0] for name in load_file(tmp_path / shard)}
    where["lm_head.weight"] = next(shard for shard in SHARDS[0] if shard != where["lm_head.weight"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(
        DymoeError, match=rf"{where['lm_head.weight']}: tensor lm_head.weight is missing, though .* names"
    ):
        Checkpoint.open(tmp_path)

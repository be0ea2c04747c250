"""`dymoe-bundle export --format onnx`: what it writes, what runs it, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
from export.onnx_kit import Runner, operators_of
from helpers import Outcome, assert_one_sentence, bundle_cli, save_tiny
from onnx import numpy_helper

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.export.matrices import Format, WholeNumbers, values_of
from dymoe_compile.export.onnx import export as onnx_export
from dymoe_compile.export.onnx.engine import tokenizer_config
from dymoe_runtime import Bundle, Tokenizer
from dymoe_runtime.bundle.records import read_record
from dymoe_runtime.bundle.tiers import dequantize
from dymoe_runtime.spec import ExpertKey

FILES = {
    *("model.onnx", "model.onnx.data", "export.json", "genai_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
}


def export(bundle: Path, output: Path, *args: object) -> Outcome:
    return bundle_cli("export", bundle, "-o", output, "--format", "onnx", *args)


def exported(bundle: Path, output: Path, *args: object) -> Path:
    outcome = export(bundle, output, *args)
    assert outcome.code == 0, outcome.err
    return output


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    model = onnx.load(str(directory / "model.onnx"))
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("form", ["contributed", "portable"])
@pytest.mark.parametrize("tier", [2, 3, 4])
def test_an_exact_export_has_every_value_of_its_tier(tiny_path: Path, tmp_path: Path, tier: int, form: str) -> None:
    bundle = Bundle.open(tiny_path)
    options = ("--portable",) if form == "portable" else ()
    tensors = tensors_of(exported(tiny_path, tmp_path / "out", "--tier", tier, *options))
    for layer in bundle.spec.moe_layers:
        codes, scales = ({}, {})
        for name in ("gate_up", "down"):
            codes[name] = tensors[f"layers.{layer}.experts.{name}"].astype(np.float32) - (128 if not options else 0)
            scales[name] = tensors[f"layers.{layer}.experts.{name}.scales"]
        for expert in range(bundle.spec.num_experts):
            segments = read_record(bundle, ExpertKey(layer, expert))
            for name, where in bundle.layout.matrices.items():
                stack, rows = ("down", slice(None)) if name == "down" else ("gate_up", slice(name == "up", None, 2))
                of_expert = codes[stack][expert, rows]
                wide = scales[stack][expert, rows].repeat(64, axis=1)[:, : of_expert.shape[1]]
                values = (of_expert * wide)[: where.rows, : where.cols]
                assert np.array_equal(values, dequantize(segments, where, tier))


def test_the_command_says_what_it_wrote_and_what_it_left(tiny_path: Path, tmp_path: Path) -> None:
    outcome = export(tiny_path, tmp_path / "out", "--json")
    values = outcome.json
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert (values["mode"], values["bits"], values["portable"]) == ("exact", 4, False)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["bundle_sha256"] == Bundle.open(tiny_path).manifest.digest
    assert any("memory budget" in note for note in record["notes"])
    assert values["bytes"] == sum(
        (tmp_path / "out" / name).stat().st_size for name in ("model.onnx", "model.onnx.data")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    text = export(tiny_path, tmp_path / "again").out
    assert "times the bundle's weights" in text and record["notes"][0] in text


def test_two_exports_are_the_same_bytes(tiny_path: Path, tmp_path: Path) -> None:
    first, second = (exported(tiny_path, tmp_path / name) for name in "ab")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("options", [(), ("--portable",)], ids=["contributed", "portable"])
def test_the_engine_generates_what_a_plain_loop_does(tiny_path: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """onnxruntime-genai, with its KV cache and tokenizer, against a session of onnxruntime that runs token by token."""
    directory = exported(tiny_path, tmp_path / "out", *options)
    assert ("com.microsoft.QMoE" in operators_of(directory / "model.onnx")) == (not options)
    model = og.Model(str(directory))
    prompt = [int(token) for token in og.Tokenizer(model).encode("def add(a, b):")]
    assert prompt == Tokenizer.load(tiny_path).encode("def add(a, b):")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 64, min_length=len(prompt) + 64, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    runner = Runner(directory / "model.onnx")
    logits, ids = runner(np.array(prompt)), list(prompt)
    for _ in range(64):
        logits[-1][0] = -np.inf  # the token that ends a text
        ids.append(int(logits[-1].argmax()))
        logits = runner(np.array(ids[-1:])).copy()
    assert generator.get_sequence(0).tolist() == ids


@pytest.mark.parametrize("name", ["NeverHeardOfTokenizer", "GPT2TokenizerFast", None])
@pytest.mark.parametrize("template", ["{{ messages[0].content }}!", [{"name": "default", "template": "{{ 1 }}!"}]])
def test_the_engine_takes_the_configuration_of_any_tokenizer(
    tiny_path: Path, tmp_path: Path, name: str | None, template: object
) -> None:
    directory = exported(tiny_path, tmp_path / "out")
    values = {"tokenizer_class": name, "chat_template": template, "eos_token": "!"}
    given = json.dumps(values if name else {"chat_template": template}).encode()
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(given)))
    tokenizer = og.Tokenizer(og.Model(str(directory)))
    assert tokenizer.apply_chat_template('[{"role": "user", "content": "1"}]') == "1!"


def test_a_bundle_without_a_configuration_of_its_tokenizer_gets_one() -> None:
    assert tokenizer_config(None) == {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--tier", 5), ("--tier 5", "2, 3, 4")),
        (("--int4",), ("--int4 and --checkpoint",)),
        (("--checkpoint", "x"), ("--int4 and --checkpoint",)),
        (("--calibration", "x"), ("--calibration",)),
        (("--context", 100000), ("--context 100000", "at most")),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tiny_path: Path, tmp_path: Path, args: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_one_sentence(export(tiny_path, tmp_path / "out", *args), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_at_the_output_stays(tiny_path: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "link":
        output.symlink_to(tmp_path / "nowhere")
    else:
        output.mkdir() if kind == "directory" else output.write_text("mine")
    assert_one_sentence(export(tiny_path, output), str(output), "-o")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert kind != "file" or output.read_text() == "mine"


def test_what_comes_to_the_output_meanwhile_stays(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(onnx_export, "write_engine_files", lambda *args: output.mkdir())
    assert_one_sentence(export(tiny_path, output), "by now", "-o")
    assert not list(output.iterdir()) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_nothing(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_export, "write_engine_files", interrupt)
    assert_one_sentence(export(tiny_path, tmp_path / "out"), "interrupted", code=130)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_removed(tiny_path: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.export"
    left.mkdir()
    (left / "model.onnx.data").write_bytes(b"half")
    exported(tiny_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_things_beside_the_output_stay(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.export" / "mine").mkdir(parents=True)
    assert_one_sentence(export(tiny_path, tmp_path / "out"), ".out.export", "-o")
    assert (tmp_path / ".out.export" / "mine").is_dir()


@pytest.fixture(scope="module")
def int4(
    tiny_path: Path, tiny_checkpoint: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An export of 4 bits from the checkpoint. Read only."""
    output = tmp_path_factory.mktemp("int4") / "out"
    return exported(tiny_path, output, "--int4", "--checkpoint", tiny_checkpoint, "--calibration", calibration_text)


def test_int4_is_as_near_to_the_checkpoint_as_4_bits_can_be(int4: Path, tiny_checkpoint: Path) -> None:
    tensors, original = tensors_of(int4), Checkpoint.open(tiny_checkpoint)
    for name, stack, rows in (("gate", "gate_up", slice(0, None, 2)), ("down", "down", slice(None))):
        pairs = tensors[f"layers.1.experts.{stack}"][3, rows]
        codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)
        values = values_of(WholeNumbers(codes, tensors[f"layers.1.experts.{stack}.scales"][3, rows]), Format(4, 32))
        weight = original.expert(ExpertKey(1, 3))[name].float().numpy()
        off = values[: weight.shape[0], : weight.shape[1]] - weight
        assert 0 < np.square(off).sum() < 0.02 * np.square(weight).sum()
        assert not values[weight.shape[0] :].any() and not values[:, weight.shape[1] :].any()
    assert json.loads((int4 / "export.json").read_text())["mode"] == "int4"


def test_int4_runs_and_two_are_the_same_bytes(
    int4: Path, tiny_path: Path, tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    assert np.isfinite(Runner(int4 / "model.onnx")(np.arange(1, 20))).all()
    options = ("--int4", "--checkpoint", tiny_checkpoint, "--calibration", calibration_text, "--tier", 4)
    outcome = export(tiny_path, tmp_path / "again", *options)
    assert outcome.code == 0 and "--tier 4 changes nothing" in outcome.err
    assert all((int4 / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in FILES)


def test_another_checkpoint_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "qwen3_moe", seed=7)
    outcome = export(tiny_path, tmp_path / "out", "--int4", "--checkpoint", other)
    outcome = replace(outcome, err=outcome.err.splitlines()[-1])  # before it, how long reading took
    assert_one_sentence(outcome, "--checkpoint", str(other), "compiled from")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.export").exists()

"""The graphs of all families compute what our decoder computes, with KV caches, by standard operators and by others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from export.onnx_kit import EIGHT, FLOAT, FOUR, RandomModel, Runner, export_graph, operators_of, spec_of
from families.cases import CASES
from families.harness import Case

from dymoe_compile.export.matrices import Format
from dymoe_compile.export.onnx.export import check_layers
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import AttentionSpec, ModelSpec

PROMPT, STEPS = 23, 4
IDS = np.random.default_rng(1).integers(1, 97, PROMPT + STEPS)
SUPPORTED = [case for case in CASES if case.family not in ("qwen3_next", "qwen3_5_moe")]


def all_logits(spec: ModelSpec, form: Format, portable: bool, directory: Path) -> tuple[np.ndarray, ...]:
    """The logits of a graph, of one pass and of a prompt and steps; and those of our decoder."""
    model = RandomModel(spec, form)
    context = min(spec.max_context, len(IDS))
    runner = Runner(export_graph(model, directory, context, portable))
    whole = runner(IDS)
    runner.reset()
    parts = np.concatenate([runner(IDS[:PROMPT]), *(runner(IDS[i : i + 1]) for i in range(PROMPT, len(IDS)))])
    return whole, parts, model.logits(IDS, context)


def assert_equal_logits(spec: ModelSpec, form: Format, portable: bool, directory: Path) -> None:
    whole, parts, ours = all_logits(spec, form, portable, directory)
    assert np.abs(whole - ours).max() < 1e-3 and np.abs(whole - parts).max() < 1e-3


@pytest.mark.parametrize("portable", [False, True], ids=["contributed", "portable"])
@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_a_graph_computes_what_the_decoder_does(case: Case, portable: bool, tmp_path: Path) -> None:
    assert_equal_logits(spec_of(case), FLOAT, portable, tmp_path)
    used = operators_of(tmp_path / "model.onnx")
    assert not portable or not any("." in name for name in used)


def with_heads_of_32(spec: ModelSpec) -> ModelSpec:
    """The same model with heads that GroupQueryAttention takes; where a part of them turned, a half does."""

    def widened(mixer: AttentionSpec) -> AttentionSpec:
        rope = mixer.rope
        if rope is not None:
            factors = (1.5,) * 16 if rope.kind == "longrope" else ()
            dims = 16 if rope.dims not in (0, mixer.head_dim) and rope.kind != "longrope" else 0
            rope = replace(rope, dims=dims, short_factors=factors, long_factors=factors)
        return replace(mixer, head_dim=32, rope=rope)

    return replace(spec, layers=tuple(replace(layer, mixer=widened(layer.mixer)) for layer in spec.layers))


@pytest.mark.parametrize("case", list({case.family: case for case in SUPPORTED}.values()), ids=str)
def test_contributed_operators_compute_what_the_decoder_does(case: Case, tmp_path: Path) -> None:
    """With experts of 4 bits, whose products are in float32; sizes are no multiples of their blocks."""
    spec = with_heads_of_32(spec_of(case))
    assert_equal_logits(spec, FOUR, False, tmp_path)
    used = operators_of(tmp_path / "model.onnx")
    assert {"com.microsoft.MatMulNBits", "com.microsoft.GatherBlockQuantized"} <= used
    assert ("com.microsoft.QMoE" in used) == (not spec.activation.startswith("gelu"))
    assert ("com.microsoft.GroupQueryAttention" in used) == any(layer.mixer.chunk is None for layer in spec.layers)


@pytest.mark.parametrize("form", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss"])
def test_whole_numbers_by_standard_operators(family: str, form: Format, tmp_path: Path) -> None:
    spec = spec_of(next(case for case in CASES if case.family == family))
    assert_equal_logits(spec, form, True, tmp_path)


def test_experts_of_8_bits_are_as_close_as_their_activations(tmp_path: Path) -> None:
    """QMoE rounds activations to 8 bits there."""
    spec = spec_of(next(case for case in CASES if case.family == "qwen3_vl_moe"))
    whole, _, ours = all_logits(spec, EIGHT, False, tmp_path)
    assert 0 < np.linalg.norm(whole - ours) < 0.05 * np.linalg.norm(ours)
    assert "com.microsoft.QMoE" in operators_of(tmp_path / "model.onnx")


@pytest.mark.parametrize("case", [case for case in CASES if case not in SUPPORTED], ids=str)
def test_layers_without_operators_are_refused_by_name(case: Case) -> None:
    with pytest.raises(DymoeError, match=rf"^{spec_of(case).model_type}: .*gated_delta.*dymoe-run$"):
        check_layers(spec_of(case))

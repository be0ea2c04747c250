"""Bits of dense weights: chosen by what they cost and what memory is worth, kept by kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundle_kit import forge
from compile_kit import interrupt, same_files
from helpers import MODEL, RATES, assert_one_sentence, bundle_cli, compile_cli, run_cli, save_tiny
from safetensors.numpy import save

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.checkpoint.original import open_original
from dymoe_compile.compile import profile_budget
from dymoe_compile.job.profile import DEVICE_PROCESS_BYTES
from dymoe_compile.job.progress import silent
from dymoe_compile.policy.dense_bits import (
    CHOSEN_TIERS,
    FEWER_BITS,
    MAX_BITS,
    DenseChoice,
    ReplacedDense,
    cheapest,
    choose_dense_bits,
    is_read,
    kind_bytes,
    kl_of_last_bits,
    kl_per_bit,
    records_of,
    write_dense,
)
from dymoe_compile.policy.sensitivity import Original
from dymoe_compile.quantize import load_descent
from dymoe_runtime.bundle.bundle import DENSE, LOOK_AHEAD, Bundle, Manifest, dense_kind, dense_kinds
from dymoe_runtime.bundle.records import read_predictors
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.model.weights import BundleDense

KERNELS = load_kernels()
BYTES = {"embed": {8: 800, 6: 600, 4: 400}, "attn": {8: 80, 6: 60, 4: 40}}


def budget_between(bundle: Bundle, share: float) -> Budget:
    """A budget with this share of the experts' memory between the least and all, of which prompts borrow nothing."""
    whole = plan_budget(bundle, KERNELS, bundle.spec.max_context, memory_bytes=0, process_bytes=DEVICE_PROCESS_BYTES)
    budget = replace(whole, spare_bytes=0)
    experts = budget.full_arena_bytes - budget.min_arena_bytes
    return replace(budget, memory_bytes=budget.need_bytes + int(share * experts))


def choice_for(bundle: Bundle, model: Path, budget: Budget) -> DenseChoice:
    windows = np.random.default_rng(0).integers(0, bundle.spec.vocab_size, (2, 32))
    whole = open_original(model, KERNELS)
    original = Original([whole.hidden(ids) for ids in windows], whole.logits)
    return choose_dense_bits(bundle, Checkpoint.open(model), windows, original, budget, KERNELS, silent)


def chosen(bundle: Bundle, model: Path, budget: Budget) -> dict[str, int]:
    return dict(choice_for(bundle, model, budget).bits)


@pytest.mark.parametrize(("active", "bits"), [(1, min(FEWER_BITS)), (1 << 60, MAX_BITS)], ids=["few", "many"])
def test_where_all_fits_dense_weights_that_are_much_of_a_token_have_fewer_bits(
    active: int, bits: int, tiny_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of embeddings costs no time, so it keeps its bits."""
    bundle = Bundle.open(tiny_path)
    assert not bundle.spec.tie_embeddings
    monkeypatch.setattr("dymoe_compile.policy.dense_bits.active_weights", lambda spec: active)
    others = {kind: bits for kind in dense_kinds(bundle.spec) if kind != "embed"}
    assert chosen(bundle, tiny_checkpoint, budget_between(bundle, 1.0)) == {"embed": MAX_BITS, **others}


@pytest.mark.parametrize("worth", [1e-3, 1e-1, 1e1])
def test_where_all_fits_a_byte_of_a_token_is_worth_what_one_of_experts_is(
    worth: float, tiny_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`worth` is the KL of one more bit for each expert weight that a token uses."""
    bundle = Bundle.open(tiny_path)
    monkeypatch.setattr("dymoe_compile.policy.dense_bits.kl_of_last_bits", lambda bits, kls: worth / CHOSEN_TIERS)
    choice = choice_for(bundle, tiny_checkpoint, budget_between(bundle, 1.0))
    spec, sizes = bundle.spec, kind_bytes(bundle.spec)
    expert_weights = spec.top_k * spec.num_layers * sum(rows * cols for rows, cols in spec.expert_shapes.values())
    for kind, added in choice.added_kl.items():
        bits_each = {bits: 8 * sizes[kind][bits] / expert_weights for bits in sizes[kind]}
        costs = {bits: added.get(str(bits), 0.0) + worth * bits_each[bits] for bits in bits_each}
        assert choice.bits[kind] == (MAX_BITS if kind == "embed" else min(costs, key=lambda bits: costs[bits]))


def test_embeddings_that_are_the_head_as_well_are_read() -> None:
    spec = Checkpoint.open(MODEL).spec
    assert spec.tie_embeddings and is_read(spec, "embed")
    assert not is_read(replace(spec, tie_embeddings=False), "embed") and is_read(spec, "attn")


def test_the_worth_of_a_bit_follows_the_measured_kl() -> None:
    bits, kls = [2.0, 3.0, 4.0], [4.0, 1.0, 0.5]
    assert kl_per_bit(bits, kls, 2.0) == pytest.approx(4.0 * np.log(4.0))
    assert kl_per_bit(bits, kls, 4.0) == pytest.approx(0.5 * np.log(2.0))
    assert kl_per_bit(bits, [1.0, 1.0, 2.0], 4.0) == 0.0
    assert kl_per_bit([2.0, 3.0], [np.inf, 0.1], 3.0) == 0.0
    assert kl_of_last_bits(bits, kls) == 0.5 and kl_of_last_bits([4.0], [1.0]) == 0.0
    assert kl_of_last_bits(bits, [1.0, 1.0, 2.0]) == 0.0 == kl_of_last_bits(bits, [1.0, np.inf, 1.0])


def test_the_less_memory_the_fewer_bytes_for_dense_weights(tiny_path: Path, tiny_checkpoint: Path) -> None:
    bundle = Bundle.open(tiny_path)
    sizes = kind_bytes(bundle.spec)
    most = sum(row[MAX_BITS] for row in sizes.values())
    saved = []
    for budget in (budget_between(bundle, 0.9), budget_between(bundle, 0.3)):  # at which not all bits are given up
        bits = chosen(bundle, tiny_checkpoint, budget)
        saved.append(most - sum(sizes[kind][b] for kind, b in bits.items()))
    least = budget_between(bundle, 0.0)
    short = replace(least, memory_bytes=least.floor_bytes - saved[-1] - 1)
    bits = chosen(bundle, tiny_checkpoint, short)
    saved.append(most - sum(sizes[kind][b] for kind, b in bits.items()))
    assert 0 <= saved[0] <= saved[1] < saved[2]


def test_a_kind_that_loses_little_gives_up_bits_first() -> None:
    added = {"embed": {8: 0.0, 6: 1e-6, 4: 1e-5}, "attn": {8: 0.0, 6: 1.0, 4: 2.0}}
    assert cheapest(added, BYTES, 1e-6, 0) == {"embed": 4, "attn": 8}
    assert cheapest(added, BYTES, 0.0, 0) == {"embed": 8, "attn": 8}


@pytest.mark.parametrize(("excess", "least"), [(1, 20), (150, 200), (410, 420), (440, 440), (10**9, 440)])
def test_what_does_not_fit_costs_bits_until_it_does(excess: int, least: int) -> None:
    """As far as bits go: the last case cannot fit, and saying so is left to who knows the device."""
    added = {"embed": {8: 0.0, 6: 1e-3, 4: 1e-2}, "attn": {8: 0.0, 6: 1e-4, 4: 1e-3}}
    bits = cheapest(added, BYTES, 0.0, excess)
    assert sum(BYTES[kind][8] - BYTES[kind][b] for kind, b in bits.items()) >= least


def test_weights_that_turn_infinite_are_never_chosen() -> None:
    added = {"embed": {8: 0.0, 6: float("inf"), 4: float("inf")}, "attn": {8: 0.0, 6: 0.0, 4: 0.0}}
    assert cheapest(added, BYTES, 1.0, 10**9) == {"embed": 8, "attn": 4}


@pytest.mark.parametrize("bits", FEWER_BITS)
def test_replaced_weights_are_those_of_the_checkpoint(bits: int, tiny_path: Path, tiny_checkpoint: Path) -> None:
    checkpoint, dense = Checkpoint.open(tiny_checkpoint), BundleDense(Bundle.open(tiny_path), KERNELS)
    coarser = ReplacedDense(dense, records_of(checkpoint, "attn", bits, load_descent(KERNELS)), KERNELS)
    x = np.random.default_rng(0).standard_normal((5, checkpoint.spec.hidden_size), np.float32)
    for name, shape in checkpoint.spec.each_tensor():
        if dense_kind(name, shape) is None or name.endswith("attn.o") or name == "embed":
            continue
        exact = x @ checkpoint.tensor(name).float().numpy().T
        fine, coarse = (np.linalg.norm(d.linear(name, x) - exact) / np.linalg.norm(exact) for d in (dense, coarser))
        assert fine < 0.02
        if ".attn." in name:
            assert 1.5 * fine < coarse < 2.0 ** (2 - bits)
        else:
            assert coarse == fine


def small_profile(path: Path, bundle: Bundle) -> Path:
    """A device that holds the bundle's dense weights and half of its experts."""
    budget = budget_between(bundle, 0.5)
    path.write_text(
        f'name = "small"\nladder = [2, 3, 4]\ndense_bits = "auto"\nmemory = "{budget.memory_bytes}"\n{RATES}'
    )
    return path


def test_a_bundle_for_a_small_device_has_measured_bits_and_resumes_to_the_same_bytes(
    tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", "olmoe")
    args = (model, "--calibration", calibration_text)
    large = tmp_path / "large.dymoe"
    assert compile_cli(*args, "-o", large, "--dense-bits", MAX_BITS).code == 0
    args = (*args, "--profile", small_profile(tmp_path / "small.toml", Bundle.open(large)))
    monkeypatch.setattr(
        "dymoe_compile.compile.profile_budget", lambda *args: replace(profile_budget(*args), spare_bytes=0)
    )
    small, again = tmp_path / "small.dymoe", tmp_path / "again.dymoe"
    assert compile_cli(*args, "-o", small).code == 0

    # Between the choice and the weights that follow it; then what was chosen is not measured again.
    written: list[dict[str, int]] = []

    def write_once(checkpoint: object, bits: dict[str, int], *rest: object) -> dict[str, int]:
        if written:
            raise KeyboardInterrupt
        written.append(bits)
        return write_dense(checkpoint, bits, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("dymoe_compile.compile.write_dense", write_once)
        assert compile_cli(*args, "-o", again).code == 130
    with monkeypatch.context() as patch:
        patch.setattr("dymoe_compile.compile.choose_dense_bits", interrupt)
        assert compile_cli(*args, "-o", again).code == 0
    assert same_files(small, again)

    bundle = Bundle.open(small)
    assert min(bundle.manifest.dense_bits.values()) < MAX_BITS
    kinds = dense_kinds(bundle.spec)
    storage = json.loads((small / "compile.json").read_text())["storage"]
    assert storage["dense_bits"] == dict(bundle.manifest.dense_bits)
    assert {kind: set(row) for kind, row in storage["dense_kl"].items()} == {kind: {"6", "4"} for kind in kinds}
    assert bundle_cli("verify", small).code == 0
    assert run_cli(small, "--prompt", "x", "--max-tokens", 4).code == 0
    assert "dense" in bundle_cli("inspect", small).out


def test_kinds_of_different_bits_run(tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever mixture is chosen, the runtime reads it as the compiler measured it."""
    model = save_tiny(tmp_path / "model", "olmoe")
    given = {"embed": 4, "attn": 6, "lm_head": 8}
    monkeypatch.setattr(
        "dymoe_compile.compile.known_choice",
        lambda spec, bits, writer: DenseChoice(given, {}),
    )
    path = tmp_path / "mixed.dymoe"
    assert compile_cli(model, "-o", path, "--calibration", calibration_text).code == 0
    bundle = Bundle.open(path)
    assert dict(bundle.manifest.dense_bits) == given
    outcome = bundle_cli("inspect", path)
    assert "attn 6, embed 4, lm_head 8 bits" in outcome.out
    assert run_cli(path, "--prompt", "abc", "--max-tokens", 4).code == 0
    checkpoint, dense = Checkpoint.open(model), BundleDense(bundle, KERNELS)
    ids = np.arange(8)
    rows = checkpoint.tensor("embed").float().numpy()[ids]
    assert 0.02 < np.linalg.norm(dense.embed(ids) - rows) / np.linalg.norm(rows) < 0.2


@pytest.mark.parametrize("bits", [{}, {"attn": 8, "embed": 8}, {"attn": 8, "embed": 3, "lm_head": 8}], ids=str)
def test_a_manifest_with_other_dense_bits_gets_one_sentence(bits: dict[str, int], tiny_path: Path) -> None:
    manifest = Bundle.open(tiny_path).manifest
    with pytest.raises(DymoeError, match="dense_bits"):
        Manifest.from_text(replace(manifest, dense_bits=bits).to_text(), "manifest.json")


@pytest.mark.parametrize(
    ("before", "after"), [('"F32","shape":[', '"I32","shape":['), ('"U8","shape":[', '"I8","shape":[')]
)
def test_a_tensor_of_another_type_gets_one_sentence(before: str, after: str, damaged: Path) -> None:
    file = damaged / DENSE
    file.write_bytes(file.read_bytes().replace(before.encode(), after.encode(), 1))
    assert_one_sentence(run_cli(damaged, "--prompt", "a"), "dense.safetensors", after[1:3], "damaged")


@pytest.mark.parametrize("change", [lambda p: p.astype(np.float64), lambda p: p[:, 1:]], ids=["float64", "narrow"])
def test_a_predictor_that_does_not_fit_gets_one_sentence(
    change: Callable[[np.ndarray], np.ndarray], damaged: Path
) -> None:
    spec = Bundle.open(damaged).spec
    predictor = np.zeros((spec.num_experts, spec.hidden_size + 1), np.float32)
    for one, fits in ((predictor, True), (np.ascontiguousarray(change(predictor)), False)):
        content = save({"1": one})
        forge(damaged, lambda directory, _, content=content: (directory / LOOK_AHEAD).write_bytes(content))
        if fits:
            assert np.array_equal(read_predictors(Bundle.open(damaged))[1], one)
        else:
            with pytest.raises(DymoeError, match="is no predictor of the model"):
                read_predictors(Bundle.open(damaged))


@pytest.mark.parametrize("bits", ["eight", "3", "", "-8", "8.0"])
def test_other_dense_bits_get_one_sentence(bits: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    outcome = compile_cli(tiny_checkpoint, "-o", tmp_path / "x.dymoe", "--dense-bits", bits)
    assert_one_sentence(outcome, "--dense-bits", "4 to 8")

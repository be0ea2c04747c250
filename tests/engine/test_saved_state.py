"""A saved sequence goes on in another run as in the one that never stopped; all else is refused in a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_kit import ALL, kernels_of
from layer_kit import ATTENTION, DELTA, LONGROPE, MOE

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.model import Model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.engine.saved import state_file
from dymoe_runtime.engine.saved.origin import Origin
from dymoe_runtime.engine.saved.state_file import MAGIC, START, Header
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.spec import LayerSpec, ModelSpec
from dymoe_runtime.store.arena import min_arena_bytes

IDS = np.random.default_rng(3).integers(1, 256, 120).tolist()
CONTEXT = 256
NOTE = json.dumps({"messages": [{"role": "user", "content": "Grüße, 你好"}]}, ensure_ascii=False)


def begin(model: Model) -> None:
    """A prompt and a few tokens of an answer."""
    model.prefill(IDS[:50])
    for token in IDS[50:60]:
        model.decode(token)


def go_on(model: Model) -> list[np.ndarray]:
    """The logits of greedy tokens, of one more prompt, and of greedy tokens after it."""
    logits = [model.decode(IDS[60])]
    logits += [model.decode(int(logits[-1].argmax())) for _ in range(5)]
    logits.append(model.prefill(IDS[61:100]))
    logits += [model.decode(int(logits[-1].argmax())) for _ in range(5)]
    return logits


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kv_bits", [8, 16, 32])
@pytest.mark.parametrize("chosen", [{"tier": 4}, {"point": "2.5"}, {"point": "2.5", "depth": False}], ids=str)
def test_a_saved_sequence_goes_on_bit_for_bit(
    kv_bits: int, chosen: dict[str, Any], tiny_path: Path, tmp_path: Path
) -> None:
    bundle, file = Bundle.open(tiny_path), tmp_path / "session"
    options = RunOptions(context=CONTEXT, kv_bits=kv_bits, **chosen)
    with load_model(bundle, options) as model:
        begin(model)
        model.save_state(file, NOTE)
        expected, tokens = go_on(model), model.tokens
    least = min_arena_bytes(bundle.layout)
    for arena, threads, context in ((least, 1, 120), (least + bundle.expert_bytes() // 2, 2, CONTEXT)):
        other = replace(options, arena_bytes=arena, threads=threads, context=context)
        with load_model(bundle, other) as model:
            model.prefill(IDS[5:90])  # is forgotten
            assert model.load_state(file) == NOTE
            assert (model.tokens, model.position) == (IDS[:60], 60)
            assert_same(go_on(model), expected)
            assert model.tokens == tokens


@pytest.mark.parametrize("name", ALL)
def test_all_kernels_keep_the_same_file(name: str, tiny_path: Path, tmp_path: Path) -> None:
    options, files = RunOptions(context=CONTEXT, kv_bits=8, tier=4), (tmp_path / "a", tmp_path / "b")
    with load_model(tiny_path, options, kernels_of(ALL[0])) as model:
        begin(model)
        model.save_state(files[0], NOTE)
        expected = model.decode(IDS[60])
    with load_model(tiny_path, options, kernels_of(name)) as model:
        model.load_state(files[0])
        model.save_state(files[1], NOTE)
        assert files[0].read_bytes() == files[1].read_bytes()
        # The reference does not round activations to 8 bits, which random weights make much of.
        assert np.linalg.norm(model.decode(IDS[60]) - expected) < 0.2 * np.linalg.norm(expected)


def test_an_empty_sequence_can_be_saved_and_one_that_fills_the_context(tiny_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "session"
    with load_model(tiny_path, RunOptions(context=64)) as model:
        for ids in ([], IDS[:64]):
            model.reset()
            if ids:
                model.prefill(ids)
            model.save_state(file)
            model.reset()
            assert model.load_state(str(file)) == ""
            assert model.tokens == ids
        assert model.reset(10) == 10 and model.tokens == IDS[:10]


def test_a_loaded_sequence_can_be_cut_as_the_saved_one(tiny_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "session"
    with load_model(tiny_path) as model:
        begin(model)
        model.save_state(file)
        model.reset(33)
        expected = model.prefill(IDS[70:80])
        model.load_state(file)
        assert model.reset(33) == 33
        assert np.array_equal(model.prefill(IDS[70:80]), expected)


def test_any_text_is_a_note(tiny_path: Path, tmp_path: Path) -> None:
    note = 'tab\t"quotes"\n\x00 \udc80 😀'
    with load_model(tiny_path) as model:
        model.save_state(tmp_path / "session", note)
        assert model.load_state(tmp_path / "session") == note


@pytest.fixture(scope="module")
def saved(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session of the tiny bundle with 60 tokens, at tier 4. Read only."""
    file = tmp_path_factory.mktemp("saved") / "session"
    with load_model(tiny_path, RunOptions(context=CONTEXT, tier=4)) as model:
        begin(model)
        model.save_state(file, NOTE)
    return file


@pytest.fixture(scope="module")
def running(tiny_path: Path) -> Iterator[Model]:
    with load_model(tiny_path, RunOptions(context=CONTEXT, tier=4)) as model:
        yield model


def refusal(model: Model, file: Path) -> str:
    """The sentence that refuses a file; the model stays usable, with its sequence or an empty one."""
    model.reset()
    begin(model)
    with pytest.raises(DymoeError) as refused:
        model.load_state(file)
    sentence = str(refused.value)
    assert sentence.startswith(f"{file}: ") and "; " in sentence and "\n" not in sentence
    assert model.tokens in ([], IDS[:60])
    if not model.tokens:
        begin(model)
    model.decode(IDS[60])
    return sentence


OTHER_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bits of the cache": ({"tier": 4, "kv_bits": 8}, ("--kv-bits 16",)),
    "a tier": ({"tier": 3}, ("at tier 4", "is at tier 3", "give --tiers 4")),
    "a point": ({"point": "2.5"}, ("at tier 4", "give --tiers 4")),
    "a context": ({"tier": 4, "context": 59}, ("60 tokens", "context of 59", "--context 256")),
}


@pytest.mark.parametrize("case", OTHER_OPTIONS)
def test_a_run_with_other_options_refuses_it(case: str, saved: Path, tiny_path: Path) -> None:
    options, words = OTHER_OPTIONS[case]
    with load_model(tiny_path, RunOptions(**options)) as model:
        with pytest.raises(DymoeError) as refused:
            model.load_state(saved)
        assert all(word in str(refused.value) for word in words), str(refused.value)
        model.prefill([1, 2, 3])
        model.prefill([1, 2, 3])
        assert model.tokens == [1, 2, 3] * 2


def test_a_rule_without_depth_is_named_by_its_options(tiny_path: Path, tmp_path: Path, running: Model) -> None:
    with load_model(tiny_path, RunOptions(context=CONTEXT, point="2.5", depth=False)) as model:
        begin(model)
        model.save_state(tmp_path / "session")
        point = model.point.removesuffix(" without depth")
    assert f"give --point {point} --no-depth" in refusal(running, tmp_path / "session")


def test_the_point_of_the_next_token_counts(tiny_path: Path, tmp_path: Path, running: Model) -> None:
    with load_model(tiny_path, RunOptions(context=CONTEXT, tier=3)) as model:
        begin(model)
        model.use("tier 4", TierRule.uniform(4, model.bundle.manifest.ladder, model.spec.num_layers))
        model.save_state(tmp_path / "session")
        expected = go_on(model)
    running.load_state(tmp_path / "session")
    assert_same(go_on(running), expected)


def test_a_point_that_no_one_asked_for_fits_any(tiny_path: Path, saved: Path, tmp_path: Path, running: Model) -> None:
    """Its choice depends on memory or time, so nothing is lost with another one."""
    with load_model(tiny_path, RunOptions(context=CONTEXT, point="auto")) as model:
        model.load_state(saved)
        model.save_state(tmp_path / "session")
        running.load_state(tmp_path / "session")
        model.use("tier 3", TierRule.uniform(3, model.bundle.manifest.ladder, model.spec.num_layers))
        with pytest.raises(DymoeError, match="tier 4"):
            model.load_state(saved)
        model.hold_tpot(model.bundle.policy.points, 0, 1.0)
        model.load_state(saved)


def test_another_bundle_refuses_it(saved: Path, damaged: Path) -> None:
    path = damaged / "manifest.json"
    bundle = Bundle.open(damaged)
    manifest = replace(bundle.manifest, provenance={**bundle.manifest.provenance, "another": 1})
    path.write_text(manifest.to_text(), encoding="utf-8")
    with load_model(damaged, RunOptions(context=CONTEXT, tier=4)) as model:
        assert "another bundle" in refusal(model, saved)


def test_a_file_that_is_no_session_is_refused(tmp_path: Path, running: Model, saved: Path) -> None:
    file = tmp_path / "other"
    assert "no such file" in refusal(running, file)
    for content in (b"", b"x", b"{}" * 100, MAGIC[:-1], b"\0" * 1000):
        file.write_bytes(content)
        assert "not a saved session" in refusal(running, file)
    assert "not a file" in refusal(running, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(running, tmp_path / "pipe")
    file.write_bytes(saved.read_bytes())
    (tmp_path / "link").symlink_to(file)
    assert running.load_state(tmp_path / "link") == NOTE


def test_every_shortened_file_is_refused(tmp_path: Path, running: Model, saved: Path) -> None:
    file, data = tmp_path / "cut", saved.read_bytes()
    for length in [len(data) * part // 16 for part in range(1, 16)] + [len(MAGIC), START.size, len(data) - 1]:
        file.write_bytes(data[:length])
        assert "its end is missing" in refusal(running, file)
    file.write_bytes(data + b"\0")
    assert "something follows" in refusal(running, file)


def test_every_changed_byte_is_found(tmp_path: Path, running: Model, saved: Path) -> None:
    file, data = tmp_path / "changed", saved.read_bytes()
    _, _, header_bytes, _ = START.unpack(data[: START.size])
    early = range(START.size + header_bytes + 4 * 60 + len(NOTE.encode()) + 2)
    places = [*early[::7], *np.random.default_rng(0).integers(early[-1], len(data), 30).tolist(), len(data) - 1]
    for place in places:
        bit = 1 << place % 8
        file.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        refusal(running, file)


def rewritten(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A file with another header, whose digest is right."""
    _, version, nbytes, _ = START.unpack(data[: START.size])
    values = json.loads(data[START.size : START.size + nbytes])
    change(values)
    header = json.dumps(values).encode()
    return (
        START.pack(MAGIC, version, len(header), hashlib.sha256(header).digest()) + header + data[START.size + nbytes :]
    )


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an unknown key": (lambda h: h.update(more=1), "unknown key 'more'"),
    "no layers": (lambda h: h.pop("layers"), "layers"),
    "layers of no list": (lambda h: h.update(layers=7), "damaged"),
    "no origin": (lambda h: h.update(origin=None), "damaged"),
    "bytes below 0": (lambda h: h["note"].update(nbytes=-1), "damaged"),
    "bytes as text": (lambda h: h["note"].update(nbytes="5"), "damaged"),
    "more bytes than the file": (lambda h: h["note"].update(nbytes=1 << 60), "its end is missing"),
    "more tokens than the file": (lambda h: h["ids"].update(nbytes=1 << 60), "its end is missing"),
    "a point that is not shown": (lambda h: h["origin"].update(point="\x1b[2J"), "malformed"),
    "kv bits as text": (lambda h: h["origin"].update(kv_bits="16"), "damaged"),
    "a layer of another shape": (
        lambda h: (h["layers"][1].update(nbytes=h["layers"][1]["nbytes"] - 8), h["note"].update(nbytes=0)),
        "damaged",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_makes_no_sense_is_refused(case: str, tmp_path: Path, running: Model, saved: Path) -> None:
    change, words = HEADERS[case]
    (tmp_path / "session").write_bytes(rewritten(saved.read_bytes(), change))
    assert words in refusal(running, tmp_path / "session")


def test_a_later_version_is_refused(tmp_path: Path, running: Model, saved: Path) -> None:
    data = saved.read_bytes()
    (tmp_path / "later").write_bytes(MAGIC + (2).to_bytes(4, "little") + os.urandom(1000))
    assert "version 2, this runtime reads 1; upgrade" in refusal(running, tmp_path / "later")
    nested = b"[" * 100_000
    start = START.pack(MAGIC, 1, len(nested), hashlib.sha256(nested).digest())
    (tmp_path / "nested").write_bytes(start + nested + data)
    assert "damaged" in refusal(running, tmp_path / "nested")
    huge = START.pack(MAGIC, 1, (1 << 32) - 1, bytes(32))
    (tmp_path / "huge").write_bytes(huge + data)
    assert "its end is missing" in refusal(running, tmp_path / "huge")


def test_a_closed_model_neither_saves_nor_loads(tiny_path: Path, saved: Path, tmp_path: Path) -> None:
    with load_model(tiny_path) as model:
        pass
    for use in (model.save_state, model.load_state):
        with pytest.raises(DymoeError, match="closed"):
            use(saved)


def test_a_session_that_cannot_be_written_leaves_the_old_one(
    running: Model, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "session"
    file.write_bytes(saved.read_bytes())
    running.reset()
    running.prefill(IDS[:7])

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(number: int) -> None:
        raise KeyboardInterrupt

    for fail, error in ((full, DymoeError), (interrupted, KeyboardInterrupt)):
        monkeypatch.setattr(state_file.os, "fsync", fail)
        with pytest.raises(error) as failed:
            running.save_state(file)
        assert fail is interrupted or "No space left" in str(failed.value)
        assert file.read_bytes() == saved.read_bytes() and os.listdir(tmp_path) == ["session"]
    monkeypatch.undo()
    for place in (tmp_path, tmp_path / "none" / "session"):
        with pytest.raises(DymoeError, match="cannot be saved there"):
            running.save_state(place)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DymoeError, match="is there, not a file"):
        running.save_state(tmp_path / "pipe")


def test_only_the_owner_reads_a_session_and_a_link_to_it_stays(running: Model, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, file = tmp_path / "link", tmp_path / "folder" / "session"
    link.symlink_to(file)
    running.save_state(link, "secret")
    assert link.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert running.load_state(file) == "secret"


def state_of(layers: tuple[LayerSpec, ...], context: int) -> tuple[ModelSpec, SequenceState, Origin]:
    spec = ModelSpec("toy", 61, 48, 512, 1e-6, layers)
    return spec, SequenceState(spec, context), Origin("bundle", context, 16, "4", "rule")


def test_a_recurrent_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "session"
    _, state, origin = state_of((LayerSpec(ATTENTION, MOE), LayerSpec(DELTA, MOE)), 16)
    state.advance(3)
    state_file.save(file, origin, [1, 2, 3], "", state)
    wider = replace(DELTA, value_dim=24)
    for layers in ((LayerSpec(ATTENTION, MOE), LayerSpec(wider, MOE)), (LayerSpec(ATTENTION, MOE),)):
        spec, other, _ = state_of(layers, 16)
        with pytest.raises(DymoeError, match="layer 1 in another shape"):
            state_file.load(file, origin, spec, other)
        assert other.length == 0


def test_a_recurrent_state_is_cleared_if_it_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "session"
    spec, state, origin = state_of((LayerSpec(DELTA, MOE),), 16)
    for array in state.layers[0].used(1):
        array[:] = 1
    state.advance(1)
    state_file.save(file, origin, [1], "", state)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"\x7f")
    with suppress(DymoeError):
        state_file.load(file, origin, spec, state)
    assert state.length == 0 and not any(array.any() for array in state.layers[0].used(0))


def test_other_positions_of_a_longer_context_are_refused(tmp_path: Path) -> None:
    """LongRoPE encodes keys by the context that a run has room for."""
    file = tmp_path / "session"
    layers = (LayerSpec(replace(ATTENTION, rope=LONGROPE), MOE),)
    spec, state, origin = state_of(layers, LONGROPE.original_max_position_embeddings)
    state_file.save(file, origin, [], "", state)
    _, longer, other = state_of(layers, origin.context + 1)
    with pytest.raises(DymoeError, match=f"give --context {origin.context}, or"):
        state_file.load(file, other, spec, longer)
    state_file.load(file, replace(other, context=2), spec, longer)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    spec, state, origin = state_of((LayerSpec(ATTENTION, MOE),), 16)
    state.advance(1)
    state_file.save(tmp_path / "session", origin, [61], "", state)
    with pytest.raises(DymoeError, match="does not know"):
        state_file.load(tmp_path / "session", origin, spec, state)
    assert state.length == 1


def test_a_header_is_what_was_written() -> None:
    section = state_file.Section(8, 1)
    header = Header(Origin("b", 2, 8, "3", "r"), section, section, (section,) * 3)
    assert Header.from_bytes(header.to_bytes(), "file") == header and header.nbytes == 40

"""What reads JSON and tensors meets any values in place of those it expects: it accepts them, or says one sentence."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_kit import sealed
from fuzz.mutate import VALUES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dymoe_compile.checkpoint.tensors import CheckpointTensors
from dymoe_runtime.bundle.bundle import Bundle, Manifest
from dymoe_runtime.bundle.policy import Policy
from dymoe_runtime.bundle.tensorfile import header_bytes, header_in
from dymoe_runtime.console import one_line
from dymoe_runtime.engine.saved.state_file import Header
from dymoe_runtime.engine.trace import read_trace
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json
from dymoe_runtime.store.warm_up import read_warm_set
from dymoe_runtime.text.tokenizer import Tokenizer

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
# Always the same ones, and as many as are tried in a second or two.
SEEDED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def changed(draw: st.DrawFn, values: Any) -> Any:
    """Values of JSON, with one to three of them replaced, removed, added or renamed."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        place = values
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            holder, key = place, draw(st.sampled_from(keys))
            place = holder[key]
            if draw(st.integers(0, 2)) == 0:
                break
        else:
            if not values:
                return values
        what = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if what == "remove":
            del holder[key]
        elif what == "replace":
            holder[key] = draw(ANY)
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(ANY)
        else:
            holder.append(draw(ANY))
    return values


def accepts(read: Callable[[], object]) -> bool:
    """Return whether a reader accepts its input; anything but one sentence fails the test."""
    try:
        read()
    except DymoeError as error:
        assert one_line(str(error))
        return False
    return True


def values_in(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@given(data=st.data())
@SEEDED
def test_any_manifest_is_read_or_refused(data: st.DataObject, tiny_path: Path) -> None:
    values = data.draw(changed(values_in(tiny_path / "manifest.json")))
    accepts(lambda: Manifest.from_text(sealed(values), "manifest.json"))


@given(data=st.data())
@SEEDED
def test_any_policy_is_read_or_refused(data: st.DataObject, tiny_path: Path) -> None:
    bundle = Bundle.open(tiny_path)
    values = data.draw(changed(values_in(tiny_path / "policy.json")))
    text = json.dumps(values)

    def read() -> None:
        policy = Policy.from_json(parse_json(text, "policy.json", "recompile"))
        policy.check("policy.json", bundle.manifest.ladder, [bundle.spec.num_experts] * bundle.spec.num_layers)
        for bits in (2.0, 99.0):
            assert policy.nearest(bits) and policy.best_within(bits)

    accepts(read)


TENSORS = {"a": ("F32", (2, 3), 24), "b": ("BF16", (4,), 8), "c": ("U8", (3,), 3)}


@given(data=st.data())
@SEEDED
def test_any_header_of_tensors_is_read_or_refused(data: st.DataObject) -> None:
    """Tensors of an accepted header are inside the file and do not overlap."""
    whole = header_bytes(TENSORS)
    values = data.draw(changed(json.loads(whole[8:])))
    text = json.dumps(values).encode()
    file = len(text).to_bytes(8, "little") + text + bytes(35)

    def read() -> None:
        end = 8 + len(text)
        for info in sorted(header_in(file, Path("x")).values(), key=lambda info: (info.start, info.nbytes)):
            assert end <= info.start and info.start + info.nbytes <= len(file)
            end = info.start + info.nbytes

    accepts(read)


@given(data=st.data())
@SEEDED
def test_any_config_of_a_checkpoint_is_read_or_refused(
    data: st.DataObject, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    values = data.draw(changed(values_in(tiny_checkpoint / "config.json")))
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "model.safetensors").symlink_to(tiny_checkpoint / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    accepts(lambda: CheckpointTensors.open(tmp_path))


@given(data=st.data())
@SEEDED
def test_any_configuration_of_a_tokenizer_is_read_or_refused(
    data: st.DataObject, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    one = {"eos_token": "!", "chat_template": [{"name": "default", "template": "{{ messages }}"}]}
    generation = {"eos_token_id": [0, 1], "do_sample": True, "temperature": 0.7, "top_k": 4, "repetition_penalty": 1.1}
    (tmp_path / "tokenizer.json").write_bytes((tiny_checkpoint / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(data.draw(changed(one))))
    (tmp_path / "generation_config.json").write_text(json.dumps(data.draw(changed(generation))))

    def read() -> None:
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.sampling is not None and tokenizer.eos_ids is not None
        if tokenizer.has_chat_template:
            assert tokenizer.template_variables is not None

    accepts(read)


@given(data=st.data())
@SEEDED
def test_any_header_of_a_session_is_read_or_refused(data: st.DataObject) -> None:
    section = {"nbytes": 8, "crc32": 1}
    digest = hashlib.sha256(b"").hexdigest()
    origin = {"bundle": digest, "context": 64, "kv_bits": 16, "point": "3", "rule": digest}
    values = data.draw(changed({"origin": origin, "ids": section, "note": section, "layers": [section] * 2}))
    accepts(lambda: Header.from_bytes(json.dumps(values).encode(), "session"))


LINE = {"pass": 0, "tokens": 1, "layer": 1, "wants": [[0, 2, 1], [3, 2, 1]], "gates": [0.5, 0.5], "hits": 1}
LINE |= {"read_bytes": 9, "look_ahead_bytes": 0, "wait_s": 0.0, "seconds": 0.1}


@given(data=st.data())
@SEEDED
def test_any_trace_and_any_warm_set_is_read_or_refused(data: st.DataObject, tiny_path: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_path)
    uses = [[0.5] * bundle.spec.num_experts] * bundle.spec.num_layers
    (tmp_path / "trace").write_text(json.dumps(data.draw(changed(LINE))) + "\n")
    (tmp_path / "warm").write_text(json.dumps(data.draw(changed({"uses": uses}))))
    accepts(lambda: list(read_trace(tmp_path / "trace", bundle)))
    accepts(lambda: read_warm_set(tmp_path / "warm", bundle))


@given(data=st.binary(max_size=60), length=st.integers(0, (1 << 64) - 1))
@SEEDED
def test_any_bytes_are_no_tensors(data: bytes, length: int) -> None:
    accepts(lambda: header_in(data, Path("x")))
    accepts(lambda: header_in(struct.pack("<Q", length) + data, Path("x")))


def test_what_is_right_is_accepted(tiny_path: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = values_in(tiny_path / "manifest.json")
    assert accepts(lambda: Manifest.from_text(sealed(manifest), "x"))
    assert accepts(lambda: CheckpointTensors.open(tiny_checkpoint))
    assert accepts(lambda: header_in(header_bytes(TENSORS) + bytes(35), Path("x")))
    (tmp_path / "trace").write_text(json.dumps(LINE))
    assert accepts(lambda: list(read_trace(tmp_path / "trace", Bundle.open(tiny_path))))
    with pytest.raises(AttributeError):
        accepts(lambda: None.fault)  # type: ignore[attr-defined]

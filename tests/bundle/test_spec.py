"""A model's specification in the manifest: what is written is read again, and what is not used is not written."""

from __future__ import annotations

import json

import pytest
from layer_kit import LONGROPE, MODELS

from dymoe_runtime.bundle.bundle import LEFT_OUT, VERSION, spec_from_json, spec_to_json
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ModelSpec, Rope

OPTIONS = {"layer norm", "sparsemixer", "parallel", "parallel without a shared expert", "parallel and scaled inputs"}


def text_of(spec: ModelSpec) -> str:
    return json.dumps(spec_to_json(spec))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read(name: str) -> None:
    spec = MODELS[name]
    values = json.loads(text_of(spec))
    for version in (VERSION, 4 if "kinds" in values else 3):
        assert spec_from_json(values, version) == spec


@pytest.mark.parametrize("name", sorted(set(MODELS) - OPTIONS))
def test_options_that_are_not_used_are_left_out(name: str) -> None:
    """So that bundles from before these options keep their bytes."""
    text = text_of(MODELS[name])
    assert not [key for key in LEFT_OUT if f'"{key}"' in text]


def test_each_option_is_written_where_it_is_used() -> None:
    texts = [text_of(MODELS[name]) for name in OPTIONS]
    assert all(any(f'"{key}"' in text for text in texts) for key in LEFT_OUT)
    assert LONGROPE.long_factors != Rope().long_factors


def test_an_unknown_norm_or_a_parallel_layer_with_more_norms_is_refused() -> None:
    values = json.loads(text_of(MODELS["parallel"]))
    for changed in ({"norm": "batch"}, {"kinds": [{**kind, "post_norms": True} for kind in values["kinds"]]}):
        with pytest.raises((ValueError, DymoeError), match="norm"):
            spec_from_json({**values, **changed}, 4)

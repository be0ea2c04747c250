"""Configurations with a key that is missing or wrong: a model, or one sentence that refuses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from families.cases import CASES
from families.harness import COMMON, Case

from dymoe_compile.families import family_of, text_config
from dymoe_compile.families.parts.config import Config
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ModelSpec

MISSING = object()
WRONG = (MISSING, None, 0, -1, 10**9, 1e9, 1e308, float("nan"), "x", True, [], [0], [[1]], {}, {"x": 1})
NOT_TEXT = ("vision_config", "audio_config", "talker_config", "code2wav_config")


def values_of(case: Case) -> dict[str, Any]:
    """What the config.json of a case says."""
    values: dict[str, Any] = json.loads(case.config(dict(COMMON)).to_json_string(use_diff=False))
    return values


def spec_of(values: dict[str, Any]) -> ModelSpec:
    """The model that a config.json describes, once all of its keys are known to be read."""
    config, family = Config(text_config(values)), family_of(values)
    try:
        spec = family.spec(config)
    except ValueError as error:  # whoever opens a checkpoint makes a sentence of it
        raise DymoeError(f"config.json: {error}") from error
    config.check_read()
    family.names(spec)
    return spec


def objects(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects of a configuration that concern text, itself first."""
    yield values
    for name, inner in values.items():
        if isinstance(inner, dict) and name not in NOT_TEXT:
            yield from objects(inner)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_key_that_is_missing_or_wrong_gives_a_model_or_one_sentence(case: Case) -> None:
    values = values_of(case)
    assert spec_of(values).model_type
    for part in objects(values):
        for name, right in list(part.items()):
            for wrong in WRONG:
                part[name] = wrong
                if wrong is MISSING:
                    del part[name]
                try:
                    assert isinstance(spec_of(values), ModelSpec)
                except DymoeError as error:
                    assert str(error).startswith("config.json: ") and "\n" not in str(error) and len(str(error)) < 500
                part[name] = right


# Keys with a default that may be the family's own.
DEFAULTS = ("rope_parameters", "rms_norm_eps", "hidden_act", "norm_topk_prob", "attention_bias", "layer_types")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_missing_key_means_what_transformers_takes_it_for(case: Case) -> None:
    values, kind = values_of(case), type(case.config(dict(COMMON)))
    text = next(part for part in objects(values) if "num_hidden_layers" in part)
    if text.get("sliding_window", 0) is None and case.family == "exaone_moe":
        pytest.skip("transformers does not read its own file")
    for name in set(DEFAULTS) & set(text):
        right = text.pop(name)
        completed = json.loads(kind.from_dict(json.loads(json.dumps(values))).to_json_string(use_diff=False))
        assert spec_of(values) == spec_of(completed), name
        text[name] = right

"""What can be compiled, as the code says it: --supported, the tables of README.md, and the refusal of the rest."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import compile_cli

from dymoe_compile.catalogue import quant_methods, supported_families, supported_formats
from dymoe_compile.families import family_of, supported
from dymoe_runtime.errors import DymoeError

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """benchmarks/models/table.py."""
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "benchmarks" / "models" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["models_table"] = module
    spec.loader.exec_module(module)
    return module


def test_supported_lists_each_family_with_its_aliases_and_each_format() -> None:
    outcome = compile_cli("--supported")
    assert outcome.code == 0 and not outcome.err
    text = " ".join(outcome.out.split())
    for family in supported_families():
        assert f"{', '.join((family.model_type, *family.aliases))} {family.about}" in text
    for kind in supported_formats():
        assert f"{kind.name} {kind.about}" in text
    assert ", ".join(quant_methods()) in text


@pytest.mark.parametrize("flags", [("--supported", "--json"), ("--json", "--supported", "-o", "unused.dymoe")])
def test_supported_as_json_is_one_object_alone(flags: tuple[str, ...]) -> None:
    outcome = compile_cli(*flags)
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 1
    assert [family["model_type"] for family in outcome.json["families"]] == supported()
    assert {"fp8", "mxfp4", "gptq", "awq"} <= set(outcome.json["quant_methods"])
    assert "plain" in {kind["name"] for kind in outcome.json["formats"]}


def test_every_family_and_alias_finds_its_module_and_says_what_it_is() -> None:
    for family in supported_families():
        assert len(family.about) > 20 and not family.about.endswith(".")
        for name in (family.model_type, *family.aliases):
            assert family_of({"model_type": name}).__name__.endswith(f".{family.model_type}")


def test_a_wrong_flag_beside_supported_and_a_missing_model_are_usage_errors() -> None:
    assert compile_cli("--supported", "--frobnicate").code == 2
    assert "Missing argument 'MODEL'" in compile_cli("-o", "unused.dymoe").err


def test_help_and_supported_load_neither_torch_nor_huggingface_hub() -> None:
    for flag in ("--help", "--supported"):
        code = (
            "import sys; from dymoe_compile.__main__ import main\n"
            f"sys.argv[1:] = ['{flag}']\n"
            "try: main()\n"
            "finally: print({'torch', 'huggingface_hub', 'transformers'} & set(sys.modules), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.strip()) == (0, "set()")


@pytest.mark.parametrize(
    ("model_type", "nearest"),
    [("qwen3", ("qwen3_moe", "qwen3_next")), ("glm4_moe_lite", ("glm4_moe",)), ("llama", ("llama4",)), ("bert", ())],
)
def test_an_unsupported_type_is_told_what_is_near_and_what_to_do(model_type: str, nearest: tuple[str, ...]) -> None:
    with pytest.raises(DymoeError) as refused:
        family_of({"model_type": model_type})
    message = str(refused.value)
    assert message.startswith(f"config.json: model_type '{model_type}' is not supported; ") and "\n" not in message
    assert "dymoe-compile --supported lists all" in message and "docs/adding-a-family.md" in message
    assert (ROOT / "docs" / "adding-a-family.md").exists()
    assert ("nearest" in message) == bool(nearest)
    for name in nearest:
        assert re.search(rf"\b{name}\b", message)


# README.md


def test_the_tables_of_the_readme_are_those_that_the_code_makes(tables: ModuleType) -> None:
    rate = re.search(r"<!-- families: python benchmarks/models/table\.py --rate (\S+) --write -->", README)
    assert rate is not None
    made = {
        "families": tables.families_table(),
        "formats": tables.formats_table(),
        "models": tables.models_table(float(rate[1])),
    }
    made_anew = tables.replaced(README, made)
    assert made_anew == README, f"run: python benchmarks/models/table.py --rate {rate[1]} --write"


def test_well_known_models_have_the_weights_that_their_makers_say(tables: ModuleType) -> None:
    for model in tables.MODELS:
        assert tables.weights(model.spec) / 1e9 == pytest.approx(model.quoted, rel=0.01), model.name

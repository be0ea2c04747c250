"""The clients in docs/serving.md, against a server."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from serving.kit import Running

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
WRITTEN = "http://127.0.0.1:8080"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", blocks("py"), ids=lambda block: block.split()[1])
def test_a_client_in_python_prints_an_answer(block: str, server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block.replace(WRITTEN, server.url), "docs/serving.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
def test_curl_prints_an_answer(server: Running) -> None:
    (lines,) = blocks("bash")
    for line in lines.strip().splitlines():
        done = subprocess.run(
            [*shlex.split(line.replace(WRITTEN, server.url)), "-s", "--fail"], capture_output=True, timeout=60
        )
        assert done.returncode == 0 and (b'"done":true' in done.stdout or b'"choices"' in done.stdout)


def test_configurations_of_other_clients_lead_to_the_server(server: Running) -> None:
    found: list[tuple[str, str]] = []
    compose, editor = sorted((yaml.safe_load(block) for block in blocks("yaml")), key=lambda block: "models" in block)
    found += [(model["apiBase"], model["model"]) for model in editor["models"]]
    (agent,) = map(tomllib.loads, blocks("toml"))
    found.append((agent["model_providers"][agent["model_provider"]]["base_url"], agent["model"]))
    container: Any = compose["services"]["open-webui"]["environment"]["OPENAI_API_BASE_URL"]
    found.append((container.replace("host.docker.internal", "127.0.0.1"), "demo"))
    for address, model in found:
        client = openai.OpenAI(base_url=address.replace(WRITTEN, server.url), api_key="none", max_retries=0)
        assert client.models.retrieve(model).id == model
    assert agent["model_providers"]["dymoe"]["wire_api"] == "responses"


def test_every_path_in_the_document_is_there(server: Running) -> None:
    for path in re.findall(r"`(/(?:v1|api)/[a-z_/]+|/(?:health|metrics|props|openapi\.json))`", TEXT):
        document = server.get("/openapi.json").decode()
        assert f'"{path}":' in document or path == "/openapi.json", path

"""The clients in docs/clients.md, against a server, and the paths in docs/serving.md."""

from __future__ import annotations

import json
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

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "clients.md").read_text(encoding="utf-8")
WRITTEN = "http://127.0.0.1:8080"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", blocks("py"), ids=lambda block: block.split()[1])
def test_a_client_in_python_prints_an_answer(block: str, server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block.replace(WRITTEN, server.url), "docs/clients.md", "exec"), {})
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
    editor, lines, compose = (yaml.safe_load(block) for block in blocks("yaml"))
    found = [(model["apiBase"], model["model"]) for model in editor["models"]]
    found += [(model["api_base"], model["model_name"]) for model in lines]
    container: Any = compose["services"]["open-webui"]["environment"]["OPENAI_API_BASE_URL"]
    found.append((container.replace("host.docker.internal", "127.0.0.1"), "demo"))
    (agent,) = map(tomllib.loads, blocks("toml"))
    found.append((agent["model_providers"][agent["model_provider"]]["base_url"], agent["model"]))
    (other,) = map(json.loads, blocks("json"))
    for name, provider in other["provider"].items():
        found += [(provider["options"]["baseURL"], model) for model in provider["models"]]
        assert {other["model"], other["small_model"]} <= {f"{name}/{model}" for model in provider["models"]}
    found += [(address, "demo") for address in re.findall(r"OPENAI_API_BASE=(\S+)", TEXT)]
    assert len(found) == 6
    for address, model in found:
        client = openai.OpenAI(base_url=address.replace(WRITTEN, server.url), api_key="none", max_retries=0)
        assert client.models.retrieve(model).id == model
    assert agent["model_providers"]["dymoe"]["wire_api"] == "responses"


def test_every_path_in_the_document_is_there(server: Running) -> None:
    text = TEXT + (DOCS / "serving.md").read_text(encoding="utf-8")
    for path in re.findall(r"`(/(?:v1|api)/[a-z_/]+|/(?:health|metrics|props|openapi\.json))`", text):
        document = server.get("/openapi.json").decode()
        assert f'"{path}":' in document or path == "/openapi.json", path

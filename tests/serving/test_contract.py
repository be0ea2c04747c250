"""Schemathesis: requests made from the server's own OpenAPI document get no 500, and what the document says."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import load_all_checks
from schemathesis.generation.modes import GenerationMode
from serving.kit import Running

load_all_checks()
NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
EXAMPLES = int(os.environ.get("DYMOE_CONTRACT_EXAMPLES", "3"))  # of each operation


def operations(server: Running) -> list[Any]:
    loaded = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [result.ok() for result in loaded.get_all_operations()]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_server_does_what_its_document_says(mode: GenerationMode, server: Running) -> None:
    checks = [schemathesis.checks.CHECKS.get_one(name) for name in NAMES]
    for operation in operations(server):
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=checks, timeout=30)

        check()


def test_the_document_names_every_path(server: Running) -> None:
    document = json.loads(server.get("/openapi.json"))
    assert document["openapi"].startswith("3.1")
    assert {"/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat", "/metrics"} <= set(document["paths"])
    assert not [name for name in document["components"]["schemas"] if "." in name]

"""Schemathesis: requests made from the server's own OpenAPI document get no 500, and what the document says."""

from __future__ import annotations

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import load_all_checks
from serving.kit import Running

load_all_checks()
NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
EXAMPLES = 6


@pytest.fixture
def api(server: Running) -> object:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_the_server_does_what_its_document_says(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=[schemathesis.checks.CHECKS.get_one(name) for name in NAMES], timeout=30)


def test_the_document_names_every_path(server: Running) -> None:
    document = json.loads(server.get("/openapi.json"))
    assert document["openapi"].startswith("3.1")
    assert {"/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat", "/metrics"} <= set(document["paths"])
    assert not [name for name in document["components"]["schemas"] if "." in name]

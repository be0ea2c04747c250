"""The OpenAPI 3.1 document of the server, made from the types of its operations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from dymoe_runtime.serving.http.endpoint import Operation
from dymoe_runtime.serving.http.exchange.responses import JSON

TEMPLATE = "#/components/schemas/{name}"
KEYS = {"bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}
EVERY_BODY = (400, 408, 413)
SUMMARIES = {
    400: "The request cannot be answered; the error names the field.",
    401: "The API key is missing or wrong.",
    403: "The page or the Host header may not use the server.",
    404: "There is no such model.",
    408: "The body did not come.",
    413: "The body is too long.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "The server failed.",
    503: "The server ends.",
}


def document(operations: Sequence[Operation], version: str, with_keys: bool) -> dict[str, Any]:
    """Return the document; `with_keys` says that requests need an API key."""
    types = list(dict.fromkeys(_types(operations)))
    references, components = msgspec.json.schema_components(types, ref_template=TEMPLATE)
    schemas = dict(zip(types, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _described(operation, schemas)
        path = re.sub(r":\w+}", "}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "DyMoE", "version": version, "summary": "A bundle, served by three protocols."},
        "paths": paths,
        "components": {"schemas": components} | ({"securitySchemes": KEYS} if with_keys else {}),
    } | ({"security": [{name: []} for name in KEYS]} if with_keys else {})


def _types(operations: Iterable[Operation]) -> Iterable[Any]:
    for operation in operations:
        found = (operation.form.answer, operation.body, operation.answer, operation.events)
        yield from (one for one in found if one is not None)


def _described(operation: Operation, schemas: dict[Any, Any]) -> dict[str, Any]:
    content = {operation.media_type: {"schema": schemas[operation.answer]} if operation.answer else {}}
    if operation.stream_type:
        # JSON schemas describe no streams; what each event holds is among the components.
        content[operation.stream_type] = {}
    answers: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    statuses = {401, 403, 500, *operation.errors, *(EVERY_BODY if operation.body else ())}
    for status in sorted(statuses):
        answers[str(status)] = {
            "description": SUMMARIES[status],
            "content": {JSON: {"schema": schemas[operation.form.answer]}},
        }
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": operation.handle.__name__,
        "responses": answers,
    }
    names = re.findall(r"{(\w+)(?::\w+)?}", operation.path)
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schemas[operation.body]}}}
    return described

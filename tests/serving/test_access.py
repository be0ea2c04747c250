"""Who may ask: hosts, origins, keys; and the limits of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving.kit import Scripted, app_of, ask
from text_kit import make_tokenizer

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.serving.http.answers.settings import Settings, read_keys
from dymoe_runtime.serving.http.exchange.bodies import Bodies
from dymoe_runtime.serving.http.exchange.errors import ApiError
from dymoe_runtime.serving.http.guard import is_local

KEYS = ("first-key", "second-key")
BODY = {"prompt": "a", "model": "scripted"}
PATHS = ["/v1/completions", "/v1/messages", "/api/generate"]


def service(**options: Any) -> Scripted:
    return Scripted(make_tokenizer(), **options)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True), ("LOCALHOST:8080", True), ("127.0.0.1:1", True), ("127.9.9.9", True), ("[::1]:80", True),
        ("[::1]", True), ("evil.com", False), ("localhost.evil.com:80", False), ("192.168.1.1:80", False), ("", False),
        ("127.0.0.1.evil.com", False), ("evil.com:127", False),
    ],
)  # fmt: skip
def test_a_host_is_local_or_refused(host: str, local: bool) -> None:
    assert is_local(host) is local
    app = app_of(service())
    assert ask(app, "GET", "/health", headers={"Host": host}).status_code == (200 if local else 403)
    open_app = app_of(service(), Settings(local=False))
    assert ask(open_app, "GET", "/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_a_page_of_another_origin_may_not_ask(path: str) -> None:
    """Not even with a request that a browser sends without asking first."""
    made = service()
    foreign = {"Origin": "http://evil.com", "Content-Type": "text/plain"}
    answer = ask(app_of(made), "POST", path, headers=foreign, json=BODY)
    assert answer.status_code == 403 and not made.requests
    assert "access-control-allow-origin" not in answer.headers
    assert ask(app_of(made), "POST", "/v1/completions", headers={"Origin": "http://localhost"}, json=BODY).is_success
    allowed = app_of(made, Settings(origins=("http://evil.com",)))
    answer = ask(allowed, "POST", "/v1/completions", headers=foreign, json=BODY)
    assert answer.is_success and answer.headers["access-control-allow-origin"] == "http://evil.com"
    other = ask(allowed, "POST", path, headers={"Origin": "http://evil.org"}, json=BODY)
    assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


def test_a_preflight_needs_no_key() -> None:
    app = app_of(service(), Settings(origins=("*",), keys=KEYS))
    asking = {"Origin": "http://a.b", "Access-Control-Request-Method": "POST"}
    asking["Access-Control-Request-Headers"] = "authorization,x-custom"
    answer = ask(app, "OPTIONS", "/v1/chat/completions", headers=asking)
    assert answer.is_success and "x-custom" in answer.headers["access-control-allow-headers"]
    assert ask(app, "POST", "/v1/completions", headers={"Origin": "http://a.b"}, json=BODY).status_code == 401


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer first-key"}, 200),
        ({"Authorization": "bearer  second-key "}, 200),
        ({"x-api-key": "second-key"}, 200),
        ({"x-api-key": "wrong", "Authorization": "Bearer first-key"}, 200),
        ({"Authorization": "Basic first-key"}, 401),
        ({"Authorization": "Bearer first-ke"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"x-api-key": "k\u00e9y".encode("latin-1")}, 401),
    ],
)
def test_a_key_lets_in(headers: Any, status: int, path: str) -> None:
    made = service()
    body = BODY | ({"max_tokens": 1, "messages": []} if path == "/v1/messages" else {"raw": True})
    answer = ask(app_of(made, Settings(keys=KEYS)), "POST", path, headers=headers, json=body)
    if status == 200:
        assert answer.status_code == (400 if path == "/v1/messages" else 200)  # the tokenizer has no chat template
        return
    assert answer.status_code == 401 and "API key" in answer.text and not made.requests
    assert ("error" in answer.json()) and answer.headers["www-authenticate"] == "Bearer"
    assert ask(app_of(made, Settings(keys=KEYS)), "GET", "/health").status_code == 200


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# of the team\nfirst-key\n\n  second-key \r\n")
    assert read_keys(path) == KEYS
    for text in ("", "# nothing\n", "short\n", "first-key\nsecond key\n", "pa\u00dfwort-lang\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DymoeError, match=r"keys.txt: .*; (give|write)"):
            read_keys(path)
    with pytest.raises(DymoeError, match="nowhere"):
        read_keys(tmp_path / "nowhere")


@pytest.mark.parametrize("path", PATHS)
def test_a_body_has_a_limit(path: str) -> None:
    app = app_of(service(), Settings(max_body_bytes=100))
    answer = ask(app, "POST", path, json=BODY | {"prompt": "a" * 200})
    assert answer.status_code == 413 and "more than 100 bytes" in answer.text

    async def pieces() -> Any:  # no length is known
        for _ in range(50):
            yield b'{"a": ' + b" " * 10

    assert ask(app, "POST", path, content=pieces()).status_code == 413


def test_all_bodies_together_have_a_limit() -> None:
    bodies = Bodies(100)
    first, second = bodies.begin(), bodies.begin()
    for taken in (first, second, bodies.begin(), bodies.begin()):
        taken.add(60)
        taken.add(40)
    with pytest.raises(ApiError, match="other long requests"):
        bodies.begin().add(1)
    bodies.end(first)
    bodies.begin().add(100)
    with pytest.raises(ApiError, match="more than 100 bytes"):
        second.add(1)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"[]", b"null", b'"a"', b"\xff", b'{"a": ' + b"[" * 100_000, b'{"prompt": "\\ud800"}', b"{}"]
)
@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_request_is_refused(path: str, data: bytes) -> None:
    answer = ask(app_of(service()), "POST", path, content=data)
    assert answer.status_code == 400 and "error" in answer.json()


def test_a_path_that_is_not_there_has_the_form_of_its_protocol() -> None:
    app = app_of(service())
    assert ask(app, "GET", "/v2").json()["error"]["type"] == "not_found_error"
    assert "nothing at /api/pull" in ask(app, "POST", "/api/pull").json()["error"]
    assert ask(app, "GET", "/v1/messages").json()["type"] == "error"
    answer = ask(app, "PUT", "/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"

"""The life of a server: its start, connections that end, and its own end."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_one_sentence, run_cli
from serving.kit import Running

LONG = {"messages": [{"role": "user", "content": "Go on"}], "stream": True, "n": 16, "temperature": 1.0}


def opened(server: Running, body: Any) -> socket.socket:
    """A connection that has sent a request."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_a_client_that_goes_away_frees_its_slot(server: Running) -> None:
    cancelled, generated = server.metric("dymoe_cancelled_answers_total"), server.metric("dymoe_generated_tokens_total")
    with opened(server, LONG) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    server.wait_until(lambda: server.metric("dymoe_slots_busy") == 0 == server.metric("dymoe_queue_length"))
    assert server.metric("dymoe_cancelled_answers_total") > cancelled
    assert server.metric("dymoe_generated_tokens_total") < generated + 16 * 24


def test_a_request_that_is_cut_off_leaves_nothing(server: Running) -> None:
    for data in (b"", b"POST /v1/chat", b"\x00\xff\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(data)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert server.get("/health") == b'{"status":"ok"}'


def test_metrics_count_what_was_done(server: Running) -> None:
    names = ("dymoe_prompt_tokens_total", "dymoe_generated_tokens_total", "dymoe_time_to_first_token_seconds_count")
    assert server.metric("dymoe_slots") == 4
    before = [server.metric(name) for name in names]
    usage = server.post("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 5})["usage"]
    after = [server.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [usage["prompt_tokens"], 5, 1]
    assert server.metric("dymoe_expert_read_bytes_total") > 0 and 0 < server.metric("dymoe_expert_hit_ratio") <= 1
    assert server.metric('dymoe_tier_share{tier="4"}') == 1 and server.metric("dymoe_process_resident_bytes") > 1 << 20


def test_sigterm_lets_an_answer_finish(serve: Callable[..., Any]) -> None:
    """The kit asserts that the exit code is 0 and stderr empty."""
    with serve("--seed", 7) as server, opened(server, LONG | {"n": 1, "max_tokens": 200}) as connection:
        received = connection.recv(1000)
        server.process.send_signal(signal.SIGTERM)
        while data := connection.recv(65536):
            received += data
        assert b"data: [DONE]" in received
        server.process.wait(10)


def test_the_grace_ends(serve: Callable[..., Any]) -> None:
    with serve("--grace", "20ms", "--queue", 16) as server, opened(server, LONG) as connection:
        received = connection.recv(1000)
        server.process.send_signal(signal.SIGTERM)
        while data := connection.recv(65536):
            received += data
        assert b"[DONE]" not in received and b"the server is ending" in received
        server.process.wait(10)


def test_a_port_in_use_is_one_sentence(server: Running, shipped_path: Path) -> None:
    outcome = run_cli("serve", shipped_path, "--port", server.port)
    assert_one_sentence(outcome, f"--port {server.port}", "in use", "choose another")
    assert_one_sentence(run_cli(shipped_path, "--serve", "--host", "192.0.2.1"), "--host 192.0.2.1")
    assert_one_sentence(run_cli("serve", shipped_path, "--api-key-file", shipped_path / "none"), "none")


def test_flags_of_serving_go_with_it(shipped_path: Path) -> None:
    for args in (("--port", 81), ("--grace", "1s"), ("--serve", "--prompt", "a"), ("--serve", "--chat")):
        assert run_cli(shipped_path, *args).code == 2


@pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 is the loopback on Linux")
def test_keys_are_asked_for_and_a_warning_is_given(serve: Callable[..., Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("a-secret-key\n")
    with serve("--api-key-file", keys, "--host", "127.0.0.2") as server:
        assert server.get("/v1/models", {"Authorization": "Bearer a-secret-key"})

"""What the tests of the server share: a server in a process of its own, and a service without a model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette

from dymoe_runtime.serving.http.answers.backend import About, Backend
from dymoe_runtime.serving.http.answers.grammars import CompiledGrammars
from dymoe_runtime.serving.http.answers.settings import Settings
from dymoe_runtime.serving.http.app import make_app
from dymoe_runtime.serving.http.table import OPERATIONS
from dymoe_runtime.serving.service.errors import Closing, Full
from dymoe_runtime.serving.service.request import GenerationRequest, ServiceState
from dymoe_runtime.text.generate import Token
from dymoe_runtime.text.tokenizer import Tokenizer

GREEDY = ("--greedy", "--tiers", "4", "--threads", "1")
MAX_TOKENS = 48


@dataclass
class Running:
    """A server, by its address and its process."""

    url: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, headers: dict[str, str] | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, headers=headers or {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics").decode(), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def wait_until(self, what: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextmanager
def serving(bundle: Path, *args: object, code: int = 0) -> Iterator[Running]:
    """Serve a bundle at a free port; the server must end with `code`, and without a traceback, on SIGTERM."""
    command = [Path(sys.executable).with_name("dymoe-run"), "serve", bundle, "--port", 0, *GREEDY, *args]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stderr is not None
        said = ""
        while (found := re.search(r"served at (http://\S+)\n", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield Running(found[1], process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (code, "")
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


class Scripted:
    """A service without a model: it answers each request with the same tokens, or raises an error."""

    name, digest, max_context = "scripted", "0" * 64, 100

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tokens: int = 4,
        texts: Sequence[Token] = (),
        error: Exception | None = None,
        wait_s: float = 0.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens, self.error, self.wait_s = tokens, error, wait_s
        self.texts = texts  # instead of so many tokens
        self.taken = 0  # tokens that readers have taken
        self.cancelled = 0
        self.requests: list[GenerationRequest] = []

    def submit(self, request: GenerationRequest) -> ScriptedAnswer:
        if isinstance(self.error, Full | Closing):
            raise self.error
        self.requests.append(request)
        return ScriptedAnswer(self, request)

    def state(self) -> ServiceState:
        return ServiceState(2, 0, 0, 2, 0, 0)

    def statistics(self) -> dict[str, Any]:
        return {}

    async def close(self, grace_s: float) -> None:
        self.error = Closing()


class ScriptedAnswer:
    def __init__(self, service: Scripted, request: GenerationRequest) -> None:
        self._service, self._open = service, True
        self.prompt_tokens, self.reused_tokens = len(request.ids), 0

    async def __aiter__(self) -> AsyncIterator[Token]:
        service = self._service
        last = Token(5, "a", "stop")
        for number, token in enumerate(service.texts or [Token(5, "a")] * (service.tokens - 1) + [last]):
            await asyncio.sleep(service.wait_s)
            if not self._open:
                return
            if service.error is not None and number:
                raise service.error
            service.taken += 1
            yield token

    def cancel(self) -> None:
        self._service.cancelled += self._open
        self._open = False

    async def aclose(self) -> None:
        self.cancel()


def app_of(service: Scripted, settings: Settings | None = None) -> Starlette:
    """The application in front of a service."""
    about = About("1", "tiny", 1, 1, "all")
    backend = Backend(service, settings or Settings(), about, CompiledGrammars(service.tokenizer))
    return make_app(backend, OPERATIONS)


def ask(app: Starlette, method: str, path: str, **options: Any) -> httpx.Response:
    """One request, by a client in this process."""

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(asked())

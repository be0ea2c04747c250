"""What the tests of the page share: a service that plays chosen answers, a server in a thread, and a browser."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.kit import app_of
from text_kit import CONFIG, save
from uvicorn import Config, Server

from dymoe_runtime.serving.http.answers.settings import Settings
from dymoe_runtime.serving.service.request import GenerationRequest, ServiceState
from dymoe_runtime.text.generate import Token
from dymoe_runtime.text.tokenizer import Tokenizer

DRIVER = shutil.which("chromedriver")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Where screenshots are kept, to be looked at.
PICTURES = Path(__file__).parents[2] / "build" / "page"
WIDTHS = {"wide": (1280, 860), "phone": (375, 780)}
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}quick {% endif %}assistant:"
)
LAYERS, RANKS = 24, 8


@dataclass
class Script:
    """One answer: its pieces, what the model thinks first, and how it ends."""

    pieces: Sequence[str] = ("Hello", " there.")
    reasoning: Sequence[str] = ()
    finish: str = "stop"
    error: Exception | None = None  # at the end of the pieces
    refusal: Exception | None = None  # in place of an answer
    endless: bool = False  # repeats the pieces until somebody stops it
    wait_s: float = 0.0  # before each piece


@dataclass
class Played:
    """The answer to one request."""

    script: Script
    request: GenerationRequest
    cancelled: bool = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.ids)

    @property
    def reused_tokens(self) -> int:
        return 0

    async def __aiter__(self) -> AsyncIterator[Token]:
        script = self.script
        for text in script.reasoning:
            await asyncio.sleep(script.wait_s)
            yield Token(5, "", reasoning=text)
        while not self.cancelled:
            for text in script.pieces:
                await asyncio.sleep(script.wait_s or (0.01 if script.endless else 0))
                if self.cancelled:
                    return
                yield Token(5, text)
            if not script.endless:
                break
        if script.error is not None:
            raise script.error
        yield Token(5, "", script.finish)

    def cancel(self) -> None:
        self.cancelled = True

    async def aclose(self) -> None:
        self.cancel()


@dataclass
class Playback:
    """A service without a model that plays scripts, in their order, and then the last one again."""

    tokenizer: Tokenizer
    scripts: deque[Script] = field(default_factory=deque)
    answers: list[Played] = field(default_factory=list)
    name: str = "Qwen3-30B-A3B"
    digest: str = "0" * 64
    max_context: int = 4096
    readings: int = 0

    def play(self, *scripts: Script) -> None:
        self.scripts = deque(scripts)
        self.answers.clear()

    @property
    def requests(self) -> list[GenerationRequest]:
        return [answer.request for answer in self.answers]

    def submit(self, request: GenerationRequest) -> Played:
        script = self.scripts.popleft() if len(self.scripts) > 1 else self.scripts[0]
        if script.refusal is not None:
            raise script.refusal
        self.answers.append(Played(script, request))
        return self.answers[-1]

    def state(self) -> ServiceState:
        return ServiceState(2, 1, 3, 64, 8 << 30, 6_500_000_000)

    def statistics(self) -> dict[str, Any]:
        """Figures of a run that goes on: each reading finds three more tokens."""
        self.readings += 1
        tokens = 600 + 3 * self.readings
        tiers = {str(i): [4, 4, 4 - (i % 3 == 0), 3, 3 - i % 2, 2, 2, 2 * (i % 5 > 0)] for i in range(LAYERS)}
        return {
            "point": "3",
            "bits_mean": 3.04,
            "tier_shares": {"0": 0.02, "2": 0.38, "3": 0.25, "4": 0.35},
            "last_token_tiers": tiers,
            "prompt_tokens": 2000,
            "new_tokens": tokens,
            "prompt_tokens_per_s": 151.3,
            "tokens_per_s": 11.2,
            "read_bytes": tokens * 30_000_000,
            "read_bytes_per_token": 30e6,
            "expert_requests": tokens * LAYERS * RANKS,
            "expert_hits": int(tokens * LAYERS * RANKS * 0.93),
            "hit_rate": 0.93,
            "look_ahead": {"reads": 3000, "bytes": 9_000_000_000, "hits": 2412, "waste": 588},
            "evictions": 40_000,
            "wait_s": 12.25,
            "arena_bytes": 5_500_000_000,
            "resident_bytes": 5_400_000_000,
        }

    async def close(self, grace_s: float) -> None:
        pass


def chat_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(save(folder, tokenizer_config={**CONFIG, "chat_template": TEMPLATE}))


@contextmanager
def served(service: Playback, settings: Settings | None = None, port: int = 0) -> Iterator[str]:
    """Serve in a thread of this process; give the address."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    server = Server(Config(app_of(service, settings), log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def until(what: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Return what a function gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found

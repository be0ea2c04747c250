"""A packed bundle, and a server on this machine that can end connections early or know no ranges."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import bundle_cli

Serving = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def packed_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle as one file. Read only."""
    path = tmp_path_factory.mktemp("packed") / "packed.dymoe"
    assert bundle_cli("pack", tiny_path, "-o", path).code == 0
    return path


@pytest.fixture
def serving() -> Serving:
    """A function that serves a directory."""
    return served


@contextmanager
def served(root: Path, ranges: bool = True, cuts: int = 0, seed: int = 0) -> Iterator[str]:
    """Serve the files below `root`; yield the address. The first `cuts` connections end at a random byte."""
    rng, left, lock = random.Random(seed), [cuts], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = root / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")) if ranges else 0
            if first >= len(data) and ranges:
                self.send_error(416)
                return
            self.send_response(206 if ranges else 200)
            if ranges:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            with lock:
                cut = left[0] > 0
                left[0] -= cut
                end = min(len(data), first + 1 + rng.randrange(len(data) // 15 + 1)) if cut else len(data)
            self.wfile.write(data[first:end])

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

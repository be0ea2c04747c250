"""Many clients on one server for a long time: some leave, some read slowly, some send what is no request.

    python benchmarks/serving/soak.py build/demo.dymoe --memory 128MiB --clients 64 --minutes 10

First a model that computes nothing else answers each prompt greedily. Then clients of a server ask the same prompts at
random, whole and as streams; a third of them leave in the middle, read slowly, or send nonsense. Every answer that a
client has read to its end must be the right one. At the end no slot may be busy, nothing may wait, and the resident set
must be within the budget and as large as it was after a quarter of the time. Prints what was seen; the exit code is 1
if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[2] / "tests"), str(Path(__file__).parent)]

from throughput import WORDS, wait_until_ready

from dymoe_runtime import RunOptions, SamplingParams, Tokenizer, generate, load_model
from dymoe_runtime.units import parse_size

NONSENSE = (b"", b"\x00\xff\xfe", b"{", b'{"prompt": 5}', b"[" * 10_000, b'{"prompt": "a", "max_tokens": -1}', b"null")
# Bytes by which the resident set may grow after the first quarter, for the allocator.
GROWTH = 16 << 20


class Soak:
    """Clients of one server, and what they saw."""

    def __init__(self, url: str, expected: dict[str, str], tokens: int, until: float) -> None:
        self.url, self.expected, self.tokens, self.until = url, expected, tokens, until
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        """Ask until the time is up."""
        generator = random.Random(seed)
        acts = [self.whole, self.stream, self.whole, self.stream, self.leaves, self.reads_slowly, self.nonsense]
        while time.monotonic() < self.until:
            act = generator.choice(acts)
            try:
                act(generator)
                self.count(act.__name__)
            except urllib.error.HTTPError as error:
                self.count(f"status {error.code}")
                if error.code == 429:
                    time.sleep(min(2.0, float(error.headers["Retry-After"])) * generator.random())
                elif error.code != 400 or act != self.nonsense:
                    self.fail(f"{act.__name__}: {error.code} {error.read()[:200]!r}")
            except (OSError, ValueError) as error:
                self.fail(f"{act.__name__}: {type(error).__name__} {error}")

    def whole(self, generator: random.Random) -> None:
        """Ask for a whole answer."""
        prompt = generator.choice(list(self.expected))
        with self.ask(prompt, False) as response:
            self.compare(prompt, json.load(response)["choices"][0]["text"])

    def stream(self, generator: random.Random, pause_s: float = 0.0) -> None:
        """Ask for a stream, and read all of it."""
        prompt, text = generator.choice(list(self.expected)), ""
        with self.ask(prompt, True) as response:
            for line in response:
                time.sleep(pause_s)
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(event["error"])
                    text += "".join(choice["text"] for choice in event["choices"])
        self.compare(prompt, text)

    def reads_slowly(self, generator: random.Random) -> None:
        """Read a stream in little bits."""
        self.stream(generator, 0.02 * generator.random())

    def leaves(self, generator: random.Random) -> None:
        """Leave in the middle of an answer, or before it begins."""
        body = self.body(generator.choice(list(self.expected)), True)
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall((head.encode() + body)[: generator.choice([20, 100, 10_000, 10_000])])
            if generator.random() < 0.7:
                connection.settimeout(generator.random())
                with suppress(TimeoutError):
                    connection.recv(generator.choice([1, 100, 2000]))

    def nonsense(self, generator: random.Random) -> None:
        """Send what is no request."""
        request = urllib.request.Request(f"{self.url}/v1/completions", generator.choice(NONSENSE))
        with urllib.request.urlopen(request, timeout=60) as response:
            raise ValueError(f"nonsense was answered with {response.status}")

    def ask(self, prompt: str, stream: bool) -> Any:
        """Return a response."""
        return urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/v1/completions", self.body(prompt, stream)), timeout=600
        )

    def body(self, prompt: str, stream: bool) -> bytes:
        """Return the JSON of a request."""
        return json.dumps({"prompt": prompt, "max_tokens": self.tokens, "stream": stream, "temperature": 0}).encode()

    def compare(self, prompt: str, text: str) -> None:
        """Compare an answer with the right one."""
        self.count("right" if text == self.expected[prompt] else "wrong")
        if text != self.expected[prompt]:
            self.fail(f"{prompt[:60]!r}: {text!r}, not {self.expected[prompt]!r}")

    def count(self, what: str) -> None:
        """Count something that was seen."""
        with self._lock:
            self.seen[what] += 1

    def fail(self, what: str) -> None:
        """Note what must not happen."""
        with self._lock:
            self.wrong.append(what)


def main() -> None:
    """Print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=24)
    args = parser.parse_args()
    expected = right_answers(args)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dymoe_runtime", str(args.bundle), "--serve", "--port", str(port)]
    command += ["--memory", args.memory, "--parallel", str(args.parallel), "--context", str(args.context)]
    process = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        seconds = 60 * args.minutes
        soak = Soak(url, expected, args.new_tokens, time.monotonic() + seconds)
        threads = [threading.Thread(target=soak.client, args=(n,)) for n in range(args.clients)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 4)
        early = state_of(url)["resident_bytes"]
        for thread in threads:
            thread.join()
        for _ in range(100):
            last = state_of(url)
            if not last["busy"] and not last["queued"]:
                break
            time.sleep(0.1)
    finally:
        process.terminate()
        code = process.wait(60)
    print(", ".join(f"{what} {count}" for what, count in sorted(soak.seen.items())))
    sizes = (early, last["resident_bytes"], last["peak"], parse_size(args.memory))
    print("resident after a quarter, at the end, peak, budget:", *(f"{size / 1e6:.1f} MB" for size in sizes))
    print(f"busy {last['busy']}, queued {last['queued']}, exit code {code}")
    print("\n".join(soak.wrong[:20]))
    flat = last["resident_bytes"] <= early + GROWTH and last["peak"] <= parse_size(args.memory)
    sys.exit(bool(soak.wrong or code or last["busy"] or last["queued"] or not flat or not soak.seen["right"]))


def state_of(url: str) -> dict[str, Any]:
    """Return how busy the server is, and its memory."""
    with urllib.request.urlopen(f"{url}/props", timeout=60) as response:
        props = json.load(response)
    state: dict[str, Any] = props["state"]
    return {**state, "peak": props["statistics"]["peak_rss_bytes"]}


def right_answers(args: argparse.Namespace) -> dict[str, str]:
    """Return prompts, some of which begin alike, and the answers of a model that does nothing else."""
    generator, words = random.Random(0), WORDS.split()
    common = " ".join(generator.choice(words) for _ in range(args.context))
    prompts = []
    for number in range(args.prompts):
        own = " ".join(generator.choice(words) for _ in range(generator.choice([1, 5, 30, 100])))
        prompts.append(f"{common[: generator.choice([0, 0, 500, 1300])]} {number} {own}")
    with load_model(args.bundle, RunOptions(context=args.context)) as model:
        tokenizer, answers = Tokenizer.of(model), {}
        for prompt in prompts:
            model.reset()
            tokens = generate(model, tokenizer, prompt, SamplingParams(), args.new_tokens)
            answers[prompt] = "".join(token.text for token in tokens)
    return answers


if __name__ == "__main__":
    main()

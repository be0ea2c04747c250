"""Tokens/s of a server with one client and with several at once, in a memory limit, beside llama-server.

    python benchmarks/models/make.py olmoe /tmp/olmoe --layers 4
    dymoe-compile /tmp/olmoe -o /tmp/olmoe.dymoe --calibration-tokens 8192
    python benchmarks/serving/throughput.py /tmp/olmoe.dymoe --clients 1 8 --limit-mb 460

Each client sends a text completion of its own and waits for the whole answer. Prompts have different random words, so
that nothing can be reused; answers have a fixed number of tokens. Each round starts each server anew, with an empty
page cache, and runs all numbers of clients; the first request of a server does not count. Prints medians and ranges
over rounds: tokens/s of all clients together, from the first token of the first answer to the last token of the last,
and over the whole time, prompts included.

With --long-prompt, one more client sends a prompt of that many words while the others' answers come, and the table has
the time between their tokens meanwhile, and how long that prompt took.

With --gguf and --llama-server, llama-server runs the same requests with the same limit and as many slots.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[2] / "tests"), str(Path(__file__).parents[1] / "streaming")]

from checks import processor
from limited import memory_limit

# Tokens of an answer that lasts until its client leaves.
MANY = 100_000
WORDS = "time man year way day thing world life hand part child eye woman place work week case point company number"


@dataclass(frozen=True)
class Figures:
    """What some clients saw together."""

    decoding: float  # tokens/s from the first token to the last
    overall: float  # tokens/s from the first request to the last token
    gap_p95_s: float  # between two tokens of an answer
    disturbed_p95_s: float = 0.0  # the same while a long prompt runs
    long_prompt_s: float = 0.0  # until its first token


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--limit-mb", type=float, default=0, help="10^6 bytes for each server's process; 0: no limit")
    parser.add_argument("--prompt-words", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024, help="tokens of each slot")
    parser.add_argument("--long-prompt", type=int, default=0, help="words of a prompt that disturbs the others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flags", default="--tiers 4", help="more flags of dymoe-run")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--llama-flags", default="", help="more flags of llama-server, such as --no-repack in a limit")
    args = parser.parse_args()
    slots = max(args.clients) + bool(args.long_prompt)
    servers = {"dymoe": [sys.executable, "-m", "dymoe_runtime", str(args.bundle), "--serve", "--parallel", str(slots)]}
    servers["dymoe"] += ["--context", str(args.context), "--ignore-eos", "--greedy", *args.flags.split()]
    if args.gguf is not None:
        command = [str(args.llama_server), "-m", str(args.gguf), "-np", str(slots), "-c", str(args.context * slots)]
        servers["llama-server"] = [*command, "--threads", "2", "--no-warmup"]
        servers["llama-server"] += args.llama_flags.split()
    found: dict[tuple[str, int], list[Figures]] = {}
    for number in range(args.rounds):
        names = list(servers) if number % 2 == 0 else list(servers)[::-1]
        for name in names:
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            with serving(servers[name], int(args.limit_mb * 1e6)) as url:
                together(url, 1, args, seed=1000)
                for clients in args.clients:
                    seed = 100 * number + clients
                    found.setdefault((name, clients), []).append(together(url, clients, args, seed))
    print_table(found, args)


@contextmanager
def serving(command: Sequence[str], limit_bytes: int) -> Iterator[str]:
    """Run a server in a memory limit with an empty page cache; yield its URL once it takes requests."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with memory_limit(limit_bytes) as group:
        enter = f"echo $$ > {group}/cgroup.procs && " if group else ""
        process = subprocess.Popen(
            ["sh", "-c", enter + 'exec "$@"', "sh", *command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return once the server takes requests; end the program if it has ended."""
    for _ in range(3000):
        if process.poll() is not None:
            raise SystemExit(f"a server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("a server did not start")


def together(url: str, clients: int, args: argparse.Namespace, seed: int) -> Figures:
    """Return what so many clients see that send a request each at once."""
    generator = random.Random(seed)
    words = WORDS.split()
    prompts = [" ".join(generator.choice(words) for _ in range(args.prompt_words)) for _ in range(clients)]
    figures = figures_of(url, prompts, args.new_tokens)
    if not args.long_prompt:
        return figures
    long = " ".join(generator.choice(words) for _ in range(args.long_prompt))
    return replace(figures, **disturbed(url, prompts, long))


def disturbed(url: str, prompts: Sequence[str], long: str) -> dict[str, float]:
    """Return the times between tokens while a long prompt runs, which begins once all others answer."""
    readers = [Reader(url, prompt, MANY) for prompt in prompts]
    read(readers, lambda: all(len(reader.times) > 1 for reader in readers))
    start = time.perf_counter()
    last = Reader(url, long, 1)
    read([*readers, last], lambda: bool(last.times))
    for reader in readers:
        reader.close()
    gaps = sorted(b - a for reader in readers for a, b in itertools.pairwise(reader.times) if b >= start)
    return {"disturbed_p95_s": gaps[int(0.95 * (len(gaps) - 1))], "long_prompt_s": last.times[0] - start}


def figures_of(url: str, prompts: Sequence[str], tokens_each: int) -> Figures:
    """Return what the clients of some prompts see."""
    started = time.perf_counter()
    readers = [Reader(url, prompt, tokens_each) for prompt in prompts]
    read(readers, lambda: all(reader.ended for reader in readers))
    for reader in readers:
        if reader.tokens != tokens_each:
            raise SystemExit(f"{url}: an answer has {reader.tokens} tokens, not {tokens_each}")
    first, last = min(reader.times[0] for reader in readers), max(reader.times[-1] for reader in readers)
    tokens = len(prompts) * tokens_each
    gaps = sorted(b - a for reader in readers for a, b in itertools.pairwise(reader.times))
    p95 = gaps[int(0.95 * (len(gaps) - 1))] if gaps else 0.0
    return Figures((tokens - 1) / (last - first), tokens / (last - started), p95)


class Reader:
    """A client that asks for a stream, and notes when its tokens come. It takes little time of the processor."""

    def __init__(self, url: str, prompt: str, tokens: int) -> None:
        self.times: list[float] = []
        self.ended, self._data = False, b""
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0.0}
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}, "cache_prompt": False}
        data = json.dumps(body).encode()
        host, port = url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=1200)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def take(self) -> None:
        """Take what has come."""
        part = self.socket.recv(1 << 16)
        self._data += part
        self.times += [time.perf_counter()] * part.count(b'"text":')
        self.ended = not part or b"[DONE]" in self._data[-100:]
        if self.ended:
            self.close()

    def close(self) -> None:
        """Leave."""
        self.ended = True
        self.socket.close()

    @property
    def tokens(self) -> int:
        """Return the tokens of the answer, as the server has counted them."""
        found = re.search(rb'"completion_tokens": ?(\d+)', self._data)
        return int(found[1]) if found else 0


def read(readers: Sequence[Reader], enough: Callable[[], bool]) -> None:
    """Read all streams in this thread until it is enough."""
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            selector.register(reader.socket, selectors.EVENT_READ, reader)
        while not enough():
            for key, _ in selector.select(1200):
                key.data.take()
                if key.data.ended:
                    selector.unregister(key.fileobj)


def print_table(found: dict[tuple[str, int], list[Figures]], args: argparse.Namespace) -> None:
    """Print the medians, and how several clients compare with one."""
    print("server        clients  decoding tokens/s     with prompts          p95 between tokens")
    for (name, clients), figures in found.items():
        decoding, overall = [f.decoding for f in figures], [f.overall for f in figures]
        gap = statistics.median(f.gap_p95_s for f in figures)
        print(f"{name:<14}{clients:>7}  {spread(decoding):<22}{spread(overall):<22}{1000 * gap:.0f} ms")
        if args.long_prompt:
            during = statistics.median(f.disturbed_p95_s for f in figures)
            took = statistics.median(f.long_prompt_s for f in figures)
            print(f"{'':<23}{1000 * during:.0f} ms ({during / gap:.2f} times) while a prompt runs for {took:.1f} s")
    for name in dict.fromkeys(name for name, _ in found):
        one = min(args.clients)
        for clients in args.clients[1:]:
            ratio = [
                statistics.median(getattr(f, which) for f in found[name, clients])
                / statistics.median(getattr(f, which) for f in found[name, one])
                for which in ("decoding", "overall")
            ]
            print(f"{name}: {clients} clients over {one}: {ratio[0]:.2f} decoding, {ratio[1]:.2f} with prompts")
    print(f"{args.rounds} rounds; {args.limit_mb:g} MB; {args.new_tokens} tokens; {processor()}")


def spread(values: Sequence[float]) -> str:
    """Return the median and the range of some values."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()

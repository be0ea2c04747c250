"""Models by name: what is fetched from a hub, resumed, recorded and refused. The hub is a server in this process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from helpers import Outcome, assert_one_sentence
from safetensors.torch import load_file, save_file

from dymoe_compile.hub import Repository, _explanation
from dymoe_runtime.bundle.bundle import read_manifest

MODEL = "maker/Tiny-MoE"
COMMIT, OLD_COMMIT = "c0ffee" + "0" * 34, "0ddba11" + "0" * 33
# Beside the checkpoint in the repository; compiling reads none of it.
UNWANTED = (
    *(
        "README.md",
        "pytorch_model.bin",
        "tiny-q4_k_m.gguf",
        "consolidated.safetensors",
        "tokenizer.model",
        "vocab.json",
    ),
    *("original/consolidated.00.pth", "original/model.safetensors"),
)
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
# Fetches without compiling; prints where to.
FETCH = """
import sys
from dymoe_compile.hub import Repository, fetch
print(fetch(Repository.parse(sys.argv[1]), lambda sentence: print(sentence, file=sys.stderr)).directory)
"""
# Runs dymoe-compile where importing the package MISSING is an error.
WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "MISSING":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
from dymoe_compile.__main__ import main
main()
"""


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked for."""

    files: dict[str, bytes]
    url: str = ""
    log: list[tuple[str, str]] = field(default_factory=list)  # (method, file), for files
    ranges: list[str] = field(default_factory=list)
    gated: bool = False
    status: int = 0  # of every answer, if it is not 0
    not_a_hub: bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # told of files, if not theirs
    breaks: dict[str, int] = field(default_factory=dict)  # file -> bytes after which the connection ends, once
    stalls: dict[str, int] = field(default_factory=dict)  # file -> bytes after which nothing comes
    stalled: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def fetched(self) -> list[str]:
        return [file for method, file in self.log if method == "GET"]

    def listing(self, commit: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            size = self.sizes.get(name, len(data))
            entry = {"rfilename": name, "size": size, "blobId": hashlib.sha1(data).hexdigest()}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
            siblings.append(entry)
        return {"id": MODEL, "modelId": MODEL, "sha": commit, "siblings": siblings, "tags": [], "private": False}


class Handler(BaseHTTPRequestHandler):
    """The endpoints of the hub that huggingface_hub asks for a model's files."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.status or self.hub.not_a_hub:
            self.answer(self.hub.status or 200, b"<html>Log in to the network</html>", {"Content-Type": "text/html"})
        elif match := re.fullmatch(f"/api/models/{MODEL}(?:/revision/(.+))?", path):
            if commit := self.commit(match[1] or "main"):
                self.answer(200, json.dumps(self.hub.listing(commit)).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(f"/{MODEL}/resolve/([^/]+)/(.+)", path):
            if commit := self.commit(match[1]):
                self.file(match[2], {"X-Repo-Commit": commit})
        elif match := re.fullmatch("/storage/(.+)", path):
            self.content(match[1], {})
        else:
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})

    def commit(self, revision: str) -> str:
        if revision in ("main", COMMIT):
            return COMMIT
        if revision in ("v1", OLD_COMMIT):
            return OLD_COMMIT
        self.answer(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        return ""

    def file(self, name: str, headers: dict[str, str]) -> None:
        self.hub.log.append((self.command, name))
        if self.hub.gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."} | headers)
        elif name not in self.hub.files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"} | headers)
        elif name.endswith(".safetensors"):  # large files are elsewhere
            data = self.hub.files[name]
            self.hub.log[-1:] = []
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            self.answer(302, b"", headers | {"Location": f"{elsewhere}/storage/{name}"})
        else:
            self.content(name, headers | {"ETag": f'"{hashlib.sha1(self.hub.files[name]).hexdigest()}"'})

    def content(self, name: str, headers: dict[str, str]) -> None:
        if name.endswith(".safetensors"):
            self.hub.log.append((self.command, name))
        data, start = self.hub.files[name], 0
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(f"{name} {wanted}")
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        if name in self.hub.breaks and self.command == "GET":
            self.answer(200, data, headers, self.hub.breaks.pop(name))
            self.close_connection = True
        elif name in self.hub.stalls and self.command == "GET":
            self.answer(200, data, headers, self.hub.stalls[name])
            self.hub.stalled.set()
            self.hub.over.wait(60)
            self.close_connection = True
        else:
            self.answer(206 if wanted else 200, data[start:], headers)

    def answer(self, status: int, body: bytes, headers: Mapping[str, str], most: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:most])
            self.wfile.flush()


@pytest.fixture(scope="module")
def repository_files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tiny checkpoint in three shards, among files that nobody needs."""
    files = {p.name: p.read_bytes() for p in tiny_checkpoint.iterdir() if p.suffix == ".json"}
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    holders, folder = {}, tmp_path_factory.mktemp("shards")
    for number, shard in enumerate(SHARDS):
        part = {name: tensors[name] for name in sorted(tensors)[number::3]}
        save_file(part, folder / shard)
        files[shard] = (folder / shard).read_bytes()
        holders |= dict.fromkeys(part, shard)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": holders}).encode()
    return files | {name: b"unwanted " + name.encode() for name in UNWANTED}


@pytest.fixture
def hub(repository_files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(dict(repository_files))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield hub
    hub.over.set()
    server.shutdown()
    server.server_close()


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process for which `hub` is the hub, with its cache in `home` and no token."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **own, "NO_PROXY": "*", **more}


def run(arguments: list[object], env: dict[str, str], cwd: Path | None = None) -> Outcome:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=cwd)
    return Outcome(done.returncode, done.stdout, done.stderr)


def compile_by_name(hub: Hub, tmp_path: Path, name: str = MODEL, *flags: object, **more: str) -> Outcome:
    arguments = ["-m", "dymoe_compile", name, "-o", tmp_path / "out.dymoe", *flags]
    return run(arguments, environment(hub, tmp_path / "home", **more))


def fetch_by_name(hub: Hub, tmp_path: Path, name: str = MODEL, **more: str) -> Path:
    outcome = run(["-c", FETCH, name], environment(hub, tmp_path / "home", **more))
    assert outcome.code == 0, outcome.err
    return Path(outcome.out.strip())


def wanted(hub: Hub) -> list[str]:
    return sorted(set(hub.files) - set(UNWANTED))


def test_a_model_compiles_by_its_name_and_the_bundle_says_where_it_came_from(
    hub: Hub, tmp_path: Path, calibration_text: Path
) -> None:
    outcome = compile_by_name(hub, tmp_path, MODEL, "--calibration", calibration_text)
    assert outcome.code == 0, outcome.err
    assert hub.fetched()[0] == "config.json" and sorted(hub.fetched()) == wanted(hub)
    assert "note: fetching 3 of 3 files with the weights of maker/Tiny-MoE" in outcome.err
    assert "%|" not in outcome.err and "\r" not in outcome.err  # no bars: stderr is no terminal
    provenance = read_manifest(tmp_path / "out.dymoe").provenance
    assert provenance["origin"] == {"repository": MODEL, "commit": COMMIT}

    hub.log.clear()
    again = compile_by_name(hub, tmp_path, MODEL, "--calibration", calibration_text, HF_HUB_OFFLINE="1")
    assert again.code == 0 and "up to date" in again.out and not hub.log
    assert "is taken from the cache, at commit c0ffee" in again.err


def test_a_bundle_of_a_directory_says_nothing_of_a_hub(tiny_path: Path) -> None:
    assert "origin" not in read_manifest(tiny_path).provenance


def test_what_is_in_the_cache_is_not_fetched_again_even_of_another_commit(hub: Hub, tmp_path: Path) -> None:
    first = fetch_by_name(hub, tmp_path)
    assert sorted(path.name for path in first.iterdir()) == wanted(hub)
    hub.log.clear()
    second = fetch_by_name(hub, tmp_path, f"{MODEL}@v1")
    assert (first.name, second.name) == (COMMIT, OLD_COMMIT) and not hub.fetched()
    assert fetch_by_name(hub, tmp_path, f"{MODEL}@{OLD_COMMIT}") == second
    hub.status = 503  # now out of order
    assert fetch_by_name(hub, tmp_path) == first


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "term")]
)
def test_an_interrupt_ends_at_once_and_the_next_run_goes_on(
    hub: Hub, tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    hub.stalls[SHARDS[1]] = 1000
    command = [sys.executable, "-m", "dymoe_compile", MODEL, "-o", str(tmp_path / "out.dymoe")]
    process = subprocess.Popen(
        command,
        env=environment(hub, tmp_path / "home"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    assert hub.stalled.wait(60)
    time.sleep(0.2)
    before = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and time.monotonic() - before < 5
    assert err.splitlines()[-1].startswith(f"dymoe-compile: {word}") and "Traceback" not in err

    hub.stalls.clear()
    hub.log.clear()
    directory = fetch_by_name(hub, tmp_path)
    assert hub.fetched() == SHARDS[1:]
    assert all((directory / shard).read_bytes() == hub.files[shard] for shard in SHARDS)


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.files[SHARDS[0]] = bytes(range(256)) * (11 << 12)  # huggingface_hub keeps pieces of 10 MiB
    hub.breaks[SHARDS[0]] = 10 << 20
    directory = fetch_by_name(hub, tmp_path)
    assert hub.ranges == [f"{SHARDS[0]} bytes={10 << 20}-"]
    assert (directory / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


# Refusals


def another_family(hub: Hub) -> None:
    hub.files["config.json"] = b'{"model_type": "qwen4_moe"}'


def an_unknown_quantization(hub: Hub) -> None:
    values = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps({**values, "quantization_config": {"quant_method": "aqlm"}}).encode()


def no_configuration(hub: Hub) -> None:
    del hub.files["config.json"]


def only_gguf(hub: Hub) -> None:
    hub.files = {"config.json": hub.files["config.json"], "tiny.gguf": b"GGUF"}


def only_pickles(hub: Hub) -> None:
    hub.files = {"config.json": hub.files["config.json"], "pytorch_model.bin": b"PK"}


def no_tokenizer(hub: Hub) -> None:
    del hub.files["tokenizer.json"]


def a_small_disk(hub: Hub) -> None:
    hub.sizes[SHARDS[2]] = 1 << 60


def gated(hub: Hub) -> None:
    hub.gated = True


def out_of_order(hub: Hub) -> None:
    hub.status = 503


def forbidden(hub: Hub) -> None:
    hub.status = 403


def another_server(hub: Hub) -> None:
    hub.not_a_hub = True


def unreachable(hub: Hub) -> None:
    hub.url = "http://127.0.0.1:9"


def as_it_is(hub: Hub) -> None:
    pass


REFUSALS = [
    (another_family, MODEL, "model_type 'qwen4_moe' is not supported", "qwen3_moe", "docs/adding-a-family.md"),
    (an_unknown_quantization, MODEL, "AQLM"),
    (no_configuration, MODEL, "it has no config.json"),
    (only_gguf, MODEL, "no weights in safetensors", "GGUF files are quantized already"),
    (only_pickles, MODEL, "no weights in safetensors", "convert"),
    (no_tokenizer, MODEL, "no tokenizer.json"),
    (a_small_disk, MODEL, "GiB are to be fetched", "free", "HF_HOME"),
    (gated, MODEL, "access to it is restricted", f"/{MODEL}", "hf auth login"),
    (out_of_order, MODEL, "HTTP 503", "later"),
    (forbidden, MODEL, "HTTP 403", "hf auth login"),
    (another_server, MODEL, "127.0.0.1", "check"),
    (unreachable, MODEL, "127.0.0.1:9 cannot be reached", "check the network", "give a directory"),
    (as_it_is, "maker/Tiny-MoD", "no such directory", "has no such model", "check the spelling", "hf auth login"),
    (as_it_is, f"{MODEL}@v9", "no revision 'v9'", "a branch, a tag or a whole commit"),
]


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [(change, name, words) for change, name, *words in REFUSALS],
    ids=[f"{change.__name__}-{name.partition('/')[2]}" for change, name, *_ in REFUSALS],
)
def test_what_cannot_be_compiled_gets_one_sentence_before_its_weights_are_fetched(
    hub: Hub, tmp_path: Path, change: Any, name: str, words: list[str]
) -> None:
    change(hub)
    assert_one_sentence(compile_by_name(hub, tmp_path, name), "dymoe-compile: ", name, *words)
    assert not [file for file in hub.fetched() if file.endswith(".safetensors")]
    if change in (another_family, an_unknown_quantization):
        assert hub.fetched() == ["config.json"]


def test_offline_with_nothing_or_too_little_in_the_cache_gets_one_sentence(hub: Hub, tmp_path: Path) -> None:
    words = (MODEL, "HF_HUB_OFFLINE is set", "unset it, or give a directory")
    assert_one_sentence(compile_by_name(hub, tmp_path, HF_HUB_OFFLINE="1"), *words)
    (fetch_by_name(hub, tmp_path) / SHARDS[1]).unlink()
    hub.log.clear()
    assert_one_sentence(compile_by_name(hub, tmp_path, HF_HUB_OFFLINE="1"), *words, f"{SHARDS[1]} is missing")
    assert not hub.log


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("huggingface_hub", ("needs the package huggingface_hub", "pip install huggingface_hub")),
        ("torch", ("pip install 'dymoe[compile]'",)),
    ],
)
def test_what_fetching_and_compiling_need_is_said_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, package: str, words: tuple[str, ...]
) -> None:
    arguments = ["-c", WITHOUT.replace("MISSING", package), MODEL, "-o", tmp_path / "o.dymoe"]
    assert_one_sentence(run(arguments, environment(hub, tmp_path)), *words)
    assert not hub.log


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ("is full", "HF_HOME", "run the same command again")),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), ("is full",)),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), ("/cache: Permission denied", "HF_HOME")),
        (OSError(errno.EIO, "Input/output error"), ("hub: Input/output error", "check", "the disk", "HF_HOME")),
        (OSError(errno.EROFS, "Read-only file system", "/cache"), ("/cache: Read-only file system", "HF_HOME")),
        (RuntimeError("CAS service error: request timed out\nmore"), ("request timed out", "check the network")),
    ],
)
def test_what_happens_while_fetching_is_explained(error: Exception, words: tuple[str, ...]) -> None:
    explanation = str(_explanation(error, Repository(MODEL)))
    assert "\n" not in explanation
    for word in words:
        assert word in explanation


# Names and paths


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("Qwen/Qwen3-30B-A3B", Repository("Qwen/Qwen3-30B-A3B")),
        ("a/b_1.5@refs/pr/3", Repository("a/b_1.5", "refs/pr/3")),
        *[
            (text, None)
            for text in ("model", "./a/b", "../a", "/a/b", "a/b/c", "~/a", "a/", "a/b@", "a//b", "a/..", "")
        ],
        *[(text, None) for text in ("a/b--c", "a/b.git", "é/a", "a b/c", ".a/b", "-a/b", "a/b-", "a-/b")],
        ("a/" + 96 * "b", Repository("a/" + 96 * "b")),
        ("a/" + 97 * "b", None),
    ],
)
def test_only_owner_and_name_are_a_repository(text: str, repository: Repository | None) -> None:
    assert Repository.parse(text) == repository


@pytest.mark.parametrize("name", ["Tiny-MoE", "./maker/Tiny-MoD", "a/b/c"])
def test_a_path_that_does_not_exist_is_called_that(hub: Hub, tmp_path: Path, name: str) -> None:
    plain = name.removeprefix("./")
    outcome = compile_by_name(hub, tmp_path, name)
    assert_one_sentence(
        outcome, f"dymoe-compile: {plain}: no such directory; give the directory of a Hugging Face checkpoint"
    )
    assert not hub.log


def test_a_path_that_exists_wins(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / MODEL).mkdir(parents=True)
    outcome = run(["-m", "dymoe_compile", MODEL, "-o", "o.dymoe"], environment(hub, tmp_path), tmp_path)
    assert_one_sentence(outcome, f"{MODEL}: this is no Hugging Face checkpoint")
    assert not hub.log

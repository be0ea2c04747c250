"""Models on the Hugging Face hub: fetch the files that compiling reads into the cache of huggingface_hub.

That package is imported only when a model is fetched. Files are fetched one by one in the main thread, so that an
interrupt ends at once. Every file that is complete stays in the cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dymoe_compile.checkpoint.directory import CONFIG, GGUF, INDEX, SINGLE, read_config, read_json
from dymoe_compile.checkpoint.quantization import MODELOPT, read_quantization
from dymoe_compile.families import family_of, text_config
from dymoe_compile.families.parts.config import Config
from dymoe_runtime.bundle.bundle import ADDED_TOKENS, TOKENIZER, TOKENIZER_EXTRAS
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.units import format_size

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

PART = r"\w(?:[\w.-]{0,94}\w)?"  # of a name, at most 96 characters
NAME = re.compile(rf"(?P<name>{PART}/{PART})(?:@(?P<revision>\S+))?", re.ASCII)
# Files beside the weights and the configuration that compiling reads, if there are such.
SMALL = (INDEX, TOKENIZER, *TOKENIZER_EXTRAS, ADDED_TOKENS)
LOG_IN = "log in with: hf auth login"
AGAIN = "run the same command again to go on"
# Errors of the disk that holds the cache; others without the name of a file are those of a network.
LOCAL_ERRORS = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True)
class Repository:
    """A model on the hub: its owner/name, and a branch, a tag or a commit; None is the main branch."""

    name: str
    revision: str | None = None

    @staticmethod
    def parse(text: str) -> Repository | None:
        """Return the repository that `owner/name` or `owner/name@revision` means, or None if `text` is neither.

        >>> Repository.parse("Qwen/Qwen3-30B-A3B@main")
        Repository(name='Qwen/Qwen3-30B-A3B', revision='main')
        """
        match = NAME.fullmatch(text)
        if match is None or "--" in match["name"] or ".." in match["name"] or match["name"].endswith(".git"):
            return None
        return Repository(match["name"], match["revision"])

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at a commit, in the cache."""

    repository: Repository
    commit: str
    directory: Path

    @property
    def origin(self) -> dict[str, str]:
        """Return what the provenance of a bundle says of where its checkpoint came from."""
        return {"repository": self.repository.name, "commit": self.commit}


class _UnreachableError(DymoeError):
    """The hub cannot be asked; what is in the cache may be enough."""


def fetch(repository: Repository, say: Callable[[str], object], weights: bool = True) -> Snapshot:
    """Fetch what compiling reads, unless the cache has it, and return where it is; without `weights` all but these.

    config.json comes first, so that a model which is not supported is refused before its weights are fetched. `say` is
    called with a sentence before that. Where the hub cannot be reached, the cache must have all files.

    Raises DymoeError if the repository or the revision does not exist or may not be read, if the model is not
    supported, if the disk is too small, or if the hub cannot be reached.
    """
    try:
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise DymoeError(
            f"{repository}: no such directory; fetching a model by its name needs the package huggingface_hub, "
            f"which is missing or incomplete ({error}); run: pip install huggingface_hub"
        ) from error
    if "HF_HUB_VERBOSITY" not in os.environ:  # an error is one sentence, and retries are none
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        commit, files = _files_of(repository)
    except _UnreachableError as error:
        return _cached(repository, error, say, weights)
    # By the name of the branch, so that the cache knows its commit when there is no network.
    directory = _file(repository, CONFIG, repository.revision).parent
    if directory.name != commit:  # the branch has just moved
        directory = _file(repository, CONFIG, commit).parent
    if MODELOPT in files:
        _file(repository, MODELOPT, commit)
    check_configuration(directory, repository)
    _check_listing(repository, files)
    for name in SMALL:
        if name in files:
            _file(repository, name, commit)
    if not weights:
        return Snapshot(repository, commit, directory)
    shards = _weights(files, directory)
    left = [files[name] for name in shards if name in files and not _is_cached(files[name], directory)]
    if left:
        needed = sum(file.size or 0 for file in left)
        _check_space(repository, needed, directory)
        say(
            f"fetching {len(left)} of {len(shards)} files with the weights of {repository.name}, "
            f"{format_size(needed)}, into {directory}"
        )
    for name in shards:
        _file(repository, name, commit)
    return Snapshot(repository, commit, directory)


def check_configuration(directory: Path, repository: Repository) -> None:
    """Raise DymoeError if the model that config.json in `directory` describes, or its format, is not supported."""
    try:
        values = read_config(directory)
        config = Config(text_config(values))
        family_of(values).spec(config)
        config.check_read()
        read_quantization(directory, values)
    except DymoeError as error:
        raise DymoeError(f"{repository}: {error}") from error


def _file(repository: Repository, name: str, revision: str | None) -> Path:
    """Return where the file `name` is in the cache, and fetch it if it is not there."""
    from huggingface_hub import hf_hub_download

    with _explained(repository):
        return Path(hf_hub_download(repository.name, name, revision=revision))


def _files_of(repository: Repository) -> tuple[str, dict[str, RepoSibling]]:
    """Return the commit of the repository, and name -> size and checksum of each of its files."""
    from huggingface_hub import HfApi

    with _explained(repository):
        info = HfApi().model_info(repository.name, revision=repository.revision, files_metadata=True)
    if not info.sha:
        raise DymoeError(f"{repository}: {_host()} does not say its commit; check HF_ENDPOINT")
    return info.sha, {file.rfilename: file for file in info.siblings or ()}


def _cached(
    repository: Repository, unreachable: _UnreachableError, say: Callable[[str], object], weights: bool
) -> Snapshot:
    """Return the snapshot in the cache, which may lack the weights if `weights` is false.

    Raises `unreachable` if there is none, or another DymoeError if it lacks a file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = hf_hub_download(repository.name, CONFIG, revision=repository.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise unreachable from None
    directory = Path(path).parent
    check_configuration(directory, repository)
    present = {file.name for file in directory.iterdir()}
    wanted = {TOKENIZER, *_weights(present, directory)}
    missing = sorted(wanted - present) or ([] if len(wanted) > 1 else ["*.safetensors"])
    if weights and missing:
        raise DymoeError(f"{unreachable}; of commit {directory.name[:12]} in the cache, {missing[0]} is missing")
    say(f"{_host()} cannot be reached; {repository.name} is taken from the cache, at commit {directory.name[:12]}")
    return Snapshot(repository, directory.name, directory)


def _check_listing(repository: Repository, files: Collection[str]) -> None:
    """Raise DymoeError if the repository has no weights in safetensors, or no tokenizer."""
    if not any(name.endswith(".safetensors") and "/" not in name for name in files):
        kind = GGUF if any(name.endswith(".gguf") for name in files) else "convert them to safetensors first"
        raise DymoeError(f"{repository}: it has no weights in safetensors; {kind}")
    if TOKENIZER not in files:
        raise DymoeError(
            f"{repository}: it has no {TOKENIZER}; make one with transformers, put it beside a copy of the other "
            "files, and give that directory"
        )


def _weights(files: Collection[str], directory: Path) -> list[str]:
    """Return the safetensors files that hold the model; `directory` has the index, if there is one."""
    if SINGLE in files:
        return [SINGLE]
    if INDEX in files:
        named = read_json(directory / INDEX).get("weight_map")
        return sorted({str(name) for name in named.values()}) if isinstance(named, Mapping) else []
    return sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)


def _is_cached(file: RepoSibling, directory: Path) -> bool:
    """Return whether the cache has a file, of this commit in `directory` or with the same content of another one."""
    if (directory / file.rfilename).exists():
        return True
    content = file.lfs.sha256 if file.lfs else file.blob_id
    return content is not None and (directory.parents[1] / "blobs" / content).exists()


def _check_space(repository: Repository, needed: int, directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DymoeError(
            f"{repository}: {format_size(needed)} are to be fetched, {format_size(free)} are free on the disk of "
            f"{_cache()}; free space, or set HF_HOME to a folder on a larger disk"
        )


@contextlib.contextmanager
def _explained(repository: Repository) -> Iterator[None]:
    """Raise what huggingface_hub and the libraries under it raise as a DymoeError with the remedy."""
    from huggingface_hub import errors

    try:
        yield
    # HTTPError is another library's class in each version. ValueError means an answer that is no hub's, RuntimeError
    # a failure of hf_xet.
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # type: ignore[attr-defined]
        raise _explanation(error, repository) from error


def _explanation(error: BaseException, repository: Repository) -> DymoeError:
    """Return the DymoeError that says what an error of huggingface_hub means, and what to do."""
    from huggingface_hub import errors

    # What it says where nothing is cached; the cause is why it could not fetch.
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explanation(error.__cause__, repository)
    host, start = _host(), f"{repository}: no such directory, and"
    if isinstance(error, errors.GatedRepoError):
        return DymoeError(
            f"{repository}: access to it is restricted; ask for it at {_endpoint()}/{repository.name}, then {LOG_IN}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return DymoeError(f"{start} {host} has no such model, or a private one; check the spelling, or {LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return DymoeError(
            f"{repository}: {host} has no revision '{repository.revision or 'main'}' of this model; "
            "give a branch, a tag or a whole commit after the @"
        )
    if isinstance(error, errors.EntryNotFoundError) and isinstance(error, errors.HfHubHTTPError):
        file = urlsplit(str(error.response.url)).path.rpartition("/")[2]
        return DymoeError(
            f"{repository}: it has no {file}; give a repository with config.json and the model's safetensors files"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _UnreachableError(
            f"{start} HF_HUB_OFFLINE is set and its files are not all in {_cache()}; unset it, or give a directory"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error.response.status_code, repository)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return DymoeError(
            f"{repository}: the disk of {_cache()} is full; free space, or set HF_HOME to a folder on a larger disk, "
            f"then {AGAIN}"
        )
    if isinstance(error, OSError) and (error.filename or number in LOCAL_ERRORS):
        return DymoeError(
            f"{error.filename or _cache()}: {error.strerror}; check the permissions and the disk, or set HF_HOME to "
            "another folder"
        )
    reason = next((line[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return _UnreachableError(
        f"{start} {host} cannot be reached or breaks off ({reason}); check the network, then {AGAIN}, "
        "or give a directory"
    )


def _refusal(status: int, repository: Repository) -> DymoeError:
    """Return the DymoeError for a request that the hub answered with an error of HTTP."""
    if status in (401, 403):
        return DymoeError(
            f"{repository}: {_host()} refuses access (HTTP {status}); {LOG_IN}, with a token that may read"
        )
    if status == 429 or status >= 500:
        return _UnreachableError(f"{repository}: {_host()} is busy or out of order (HTTP {status}); {AGAIN} later")
    return DymoeError(f"{repository}: {_host()} answered with HTTP {status}; check HF_ENDPOINT and the name")


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _host() -> str:
    return urlsplit(_endpoint()).netloc or _endpoint()


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE

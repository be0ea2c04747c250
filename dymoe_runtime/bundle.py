"""A bundle on disk: manifest.json, policy.json, tokenizer, dense weights, one file of records per layer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json
from dymoe_runtime.policy import Policy
from dymoe_runtime.spec import ExpertKey, ModelSpec, check_ladder, strict
from dymoe_runtime.tensorfile import read_header, read_into
from dymoe_runtime.tiers import RecordLayout, make_layout, split_record

try:  # the same number as zlib's, four times as fast
    from isal.isal_zlib import crc32
except ImportError:  # a machine for which it is not built
    from zlib import crc32

VERSION = 3
DAMAGED = "the bundle is damaged: copy it again, or compile it again with --fresh"
# Of a kind of dense matrices: quantized, or 16 as bf16.
DENSE_BITS = (4, 5, 6, 7, 8, 16)
MANIFEST = "manifest.json"
POLICY = "policy.json"
FINDINGS = "compile.json"
REPORT = "report.html"
LOOK_AHEAD = "look_ahead.safetensors"
DENSE = "dense.safetensors"
TOKENIZER = "tokenizer.json"
# Kept beside the tokenizer where the checkpoint has them.
TOKENIZER_EXTRAS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle; `sha256` for small files, larger ones are checked piece by piece."""

    nbytes: int
    sha256: str = ""


@dataclass(frozen=True)
class LayerEntry:
    """The records of one layer: expert e is at data_start + e * record_bytes."""

    file: str
    data_start: int
    crc32: tuple[tuple[int, ...], ...]  # [experts][segments], of each segment with its padding


@dataclass(frozen=True)
class Manifest:
    """manifest.json, checked."""

    spec: ModelSpec
    ladder: tuple[int, ...]
    dense_bits: Mapping[str, int]  # kind of dense matrix -> one of DENSE_BITS
    files: Mapping[str, FileEntry]
    dense_crc32: Mapping[str, int]
    layers: Mapping[int, LayerEntry]
    provenance: Mapping[str, Any]
    version: int = VERSION

    def to_text(self) -> str:
        """Canonical JSON that ends with the digest of the rest."""
        body = asdict(self)
        body["layers"] = {str(layer): entry for layer, entry in body["layers"].items()}
        body["sha256"] = _digest(body)
        return json.dumps(body, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_text(text: str, where: str) -> Manifest:
        data = parse_json(text, where, DAMAGED)
        if data.get("version") != VERSION:
            raise DymoeError(
                f"{where}: version {data.get('version')}, this runtime reads {VERSION}; recompile or upgrade"
            )
        if data.pop("sha256", None) != _digest(data):
            raise DymoeError(f"{where}: does not match its own digest; {DAMAGED}")
        data["spec"] = ModelSpec.from_json(data["spec"])
        data["ladder"] = check_ladder(data["ladder"])
        data["files"] = {name: strict(FileEntry, entry, where) for name, entry in data["files"].items()}
        data["layers"] = {int(layer): _layer_entry(entry, where) for layer, entry in data["layers"].items()}
        manifest: Manifest = strict(Manifest, data, where)
        kinds = set(dense_kinds(manifest.spec))
        if set(manifest.dense_bits) != kinds or not set(manifest.dense_bits.values()) <= set(DENSE_BITS):
            raise DymoeError(f"{where}: dense_bits do not give bits for {', '.join(sorted(kinds))}; {DAMAGED}")
        return manifest


class Bundle:
    """An opened bundle. Opening checks everything but the weights themselves."""

    def __init__(self, path: Path, manifest: Manifest, policy: Policy) -> None:
        self.path = path
        self.manifest = manifest
        self.policy = policy
        self.spec = manifest.spec
        self.layout = expert_layout(manifest.spec, manifest.ladder)

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Bundle:
        """Open the directory `path`; DymoeError names what is missing, damaged or too new."""
        directory = Path(path)
        manifest = read_manifest(directory)
        for name, entry in manifest.files.items():
            _check_file(directory / name, entry)
        policy = Policy.from_json(json.loads((directory / POLICY).read_text(encoding="utf-8")))
        return Bundle(directory, manifest, policy)

    def record_span(self, key: ExpertKey) -> tuple[Path, int]:
        """File and offset of the record of one expert."""
        entry = self.manifest.layers[key.layer]
        return self.path / entry.file, entry.data_start + key.expert * self.layout.record_bytes

    def read_record(self, key: ExpertKey) -> list[np.ndarray]:
        """All segments of one expert, checked; for tools, the runtime reads through the store."""
        path, offset = self.record_span(key)
        record = np.empty(self.layout.record_bytes, np.uint8)
        with open(path, "rb") as file:
            read_into(file.fileno(), path, offset, memoryview(record))
        segments = split_record(self.layout, record)
        for index, segment in enumerate(segments):
            self.check_segment(key, index, segment)
        return segments

    def check_segment(self, key: ExpertKey, segment: int, data: np.ndarray | memoryview) -> None:
        """DymoeError unless `data` has the checksum that the manifest gives."""
        if crc32(data) != self.manifest.layers[key.layer].crc32[key.expert][segment]:
            tier = self.layout.ladder[segment]
            path, offset = self.record_span(key)
            raise DymoeError(
                f"{path}: expert {key}, tier {tier}: checksum mismatch in the record at offset {offset}; {DAMAGED}"
            )

    def verify(self) -> Iterator[tuple[str, str]]:
        """Checks every tensor and record; yields (what was checked, problem or "")."""
        for name in self.manifest.files:
            if name.endswith(".safetensors") and name != LOOK_AHEAD:
                yield name, _problem(lambda name=name: self._verify_index(name))
        for name in self.manifest.dense_crc32:
            yield f"{DENSE}: {name}", _problem(lambda name=name: self._verify_dense(name))
        for layer in self.manifest.layers:
            for expert in range(self.spec.num_experts):
                key = ExpertKey(layer, expert)
                yield f"expert {key}", _problem(lambda key=key: self.read_record(key))

    def expert_bytes(self) -> int:
        """Bytes of all records."""
        return len(self.manifest.layers) * self.spec.num_experts * self.layout.record_bytes

    def total_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.manifest.files.values()) + (self.path / MANIFEST).stat().st_size

    def _verify_index(self, name: str) -> None:
        header = read_header(self.path / name)
        expected = set(self.manifest.dense_crc32)
        for layer, entry in self.manifest.layers.items():
            if entry.file == name:
                expected = {record_name(ExpertKey(layer, e)) for e in range(self.spec.num_experts)}
                for expert in range(self.spec.num_experts):
                    key = ExpertKey(layer, expert)
                    info = header.get(record_name(key))
                    if info and (info.start, info.nbytes) != (self.record_span(key)[1], self.layout.record_bytes):
                        raise DymoeError(
                            f"{self.path / name}: record of expert {key} is not where the manifest says; {DAMAGED}"
                        )
        if set(header) != expected:
            raise DymoeError(f"{self.path / name}: its index does not list the tensors of the manifest; {DAMAGED}")

    def _verify_dense(self, name: str) -> None:
        path = self.path / DENSE
        info = read_header(path).get(name)
        if info is None:
            raise DymoeError(f"{path}: tensor {name} is missing; {DAMAGED}")
        data = np.empty(info.nbytes, np.uint8)
        with open(path, "rb") as file:
            read_into(file.fileno(), path, info.start, memoryview(data))
        check_dense(path, name, data, self.manifest.dense_crc32[name])


def expert_layout(spec: ModelSpec, ladder: tuple[int, ...]) -> RecordLayout:
    """The layout of every expert record of a model."""
    return make_layout(spec.expert_shapes, ladder)


def dense_layout(shape: tuple[int, ...], bits: int) -> RecordLayout:
    """A dense matrix is a record with one matrix `weight` and a single tier."""
    return make_layout({"weight": (shape[0], shape[1])}, (bits,), page=1)


def dense_kind(name: str, shape: tuple[int, ...]) -> str | None:
    """embed, lm_head, attn or mlp: dense matrices of one kind share their bits. None: kept in float32."""
    if len(shape) != 2 or name.endswith(".router"):
        return None
    return name.split(".")[2] if name.startswith("layers.") else name


def dense_kinds(spec: ModelSpec) -> list[str]:
    """Those that the model has, in the order of its tensors."""
    kinds = (dense_kind(name, shape) for name, shape in spec.each_tensor())
    return list(dict.fromkeys(kind for kind in kinds if kind is not None))


def quantized_bits(name: str, shape: tuple[int, ...], dense_bits: Mapping[str, int]) -> int | None:
    """Bits of a dense tensor that is quantized; norms, biases and routers are not, nor any kind at 16 bits."""
    kind = dense_kind(name, shape)
    return dense_bits[kind] if kind is not None and dense_bits[kind] <= 8 else None


def record_name(key: ExpertKey) -> str:
    return f"experts.{key}"


def layer_file(index: int) -> str:
    return f"experts-{index:05d}.safetensors"


def check_dense(path: Path, name: str, data: np.ndarray, checksum: int) -> None:
    if crc32(memoryview(data)) != checksum:
        raise DymoeError(f"{path}: tensor {name}: checksum mismatch; {DAMAGED}")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the bundle `directory`; DymoeError if there is none that this runtime reads."""
    if not directory.is_dir():
        what = "not a directory" if directory.exists() else "no such bundle"
        raise DymoeError(f"{directory}: {what}; make one with dymoe-compile MODEL -o {directory}")
    path = directory / MANIFEST
    if not path.exists():
        raise DymoeError(f"{path}: no such file; {directory} is not a bundle, or damaged: recompile it")
    try:
        return Manifest.from_text(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DymoeError(f"{path}: not valid UTF-8; {DAMAGED}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DymoeError(f"{path}: malformed ({error!r}); {DAMAGED}") from error


def file_entry(path: Path, digest: bool) -> FileEntry:
    data_digest = hashlib.sha256(path.read_bytes()).hexdigest() if digest else ""
    return FileEntry(path.stat().st_size, data_digest)


def _check_file(path: Path, entry: FileEntry) -> None:
    if not path.exists():
        raise DymoeError(f"{path}: missing; {DAMAGED}")
    if path.stat().st_size != entry.nbytes:
        raise DymoeError(f"{path}: {path.stat().st_size} bytes of {entry.nbytes}; {DAMAGED}")
    if entry.sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != entry.sha256:
        raise DymoeError(f"{path}: does not match the manifest; {DAMAGED}")


def _layer_entry(entry: Mapping[str, Any], where: str) -> LayerEntry:
    values = {**entry, "crc32": tuple(tuple(row) for row in entry.get("crc32", ()))}
    layer: LayerEntry = strict(LayerEntry, values, where)
    return layer


def _problem(check: Any) -> str:
    try:
        check()
    except DymoeError as error:
        return str(error)
    return ""


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

"""A bundle on disk: manifest.json, policy.json, tokenizer, dense weights, and one file of records per MoE layer.

`Bundle.open` reads and checks the small files. `records.py` reads and checks weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from dymoe_runtime.bundle.policy import Policy
from dymoe_runtime.bundle.tiers import PAGE, RecordLayout, check_ladder, make_layout
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import (
    MAX_JSON_BYTES,
    Bytes,
    FileName,
    Sha256,
    Word,
    parse_json,
    strict,
)
from dymoe_runtime.spec import (
    ACTIVATIONS,
    AttentionSpec,
    Count,
    ExpertKey,
    Factor,
    GatedDeltaSpec,
    LayerSpec,
    MixerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    Number,
    Positive,
    Rope,
    RouterSpec,
    alike_layers,
    is_exact,
)
from dymoe_runtime.storage import MANIFEST, Directory, Member, Storage, open_storage, read_bounded

# Versions of the format. Since version 5 each file has a digest. `spec` has one of the forms of versions 3 and 4, the
# older if that can hold the model; since version 6 that may name the grid of the experts.
VERSION, OLDEST, WHOLE = 6, 3, 5
OLD_FORM, NEW_FORM = 3, 4
# Kinds of rotary embeddings that version 3 knows.
OLD_ROPES = ("default", "linear", "llama3", "yarn")
# Fields of `spec` that are left out where they have these values.
LEFT_OUT: Mapping[str, Any] = {
    "norm": "rms",
    "head_bias": False,
    "parallel": False,
    "threshold": 0.0,
    "short_factors": (),
    "long_factors": (),
    "long_attention_factor": 1.0,
}
# Types of a layer's parts -> what a bundle can hold of them.
_KINDS: dict[Any, tuple[type, ...]] = {
    MixerSpec: (AttentionSpec, GatedDeltaSpec),
    MoeSpec | MlpSpec: (MoeSpec, MlpSpec),
}
DAMAGED = "the bundle is damaged: copy it again, or compile it again with --fresh"
# More layers than any model has; version 3 gives their number alone.
MAX_LAYERS = 1 << 14
# Bits that a kind of dense matrices may have: 16 is bf16, fewer is quantized.
DENSE_BITS = (4, 5, 6, 7, 8, 16)
POLICY = "policy.json"
FINDINGS = "compile.json"
REPORT = "report.html"
LOOK_AHEAD = "look_ahead.safetensors"
DENSE = "dense.safetensors"
TOKENIZER = "tokenizer.json"
# The type and the shape of a tensor in a file.
Stored = tuple[str, tuple[int, ...]]
# Copied next to the tokenizer if the checkpoint has them.
TOKENIZER_EXTRAS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Of old checkpoints; a bundle has these tokens in its tokenizer.json.
ADDED_TOKENS = "added_tokens.json"


@dataclass(frozen=True)
class FileEntry:
    """The size of a file of the bundle, and its digest.

    Before version 5, `sha256` is empty for weights, which have a CRC-32 for each dense tensor and each segment.
    """

    nbytes: Bytes
    sha256: Sha256 = ""


@dataclass(frozen=True)
class LayerEntry:
    """The records of one layer: the record of expert e starts at data_start + e * record_bytes of `file`."""

    file: FileName
    data_start: Bytes
    crc32: tuple[tuple[Word, ...], ...]  # [experts][segments], each over a segment and its padding


@dataclass(frozen=True)
class Manifest:
    """The checked content of manifest.json."""

    spec: ModelSpec
    ladder: tuple[int, ...]
    dense_bits: Mapping[str, int]  # kind of dense matrix -> one of DENSE_BITS
    files: Mapping[str, FileEntry]
    dense_crc32: Mapping[str, int]
    layers: Mapping[int, LayerEntry]
    provenance: Mapping[str, Any]
    digest: str = field(default="", compare=False)  # of the file that it was read from

    @property
    def vouches(self) -> bool:
        """Return whether the manifest's digest vouches for every byte of the bundle."""
        return all(entry.sha256 for entry in self.files.values())

    def is_weights(self, name: str) -> bool:
        """Return whether a file holds weights, whose checksums are checked as they are read."""
        return name == DENSE or any(entry.file == name for entry in self.layers.values())

    def to_text(self) -> str:
        """Return JSON with sorted keys; `sha256` holds the digest of all other keys."""
        body = {
            "spec": spec_to_json(self.spec),
            "ladder": list(self.ladder),
            "dense_bits": dict(self.dense_bits),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "dense_crc32": dict(self.dense_crc32),
            "layers": {str(layer): asdict(entry) for layer, entry in self.layers.items()},
            "provenance": dict(self.provenance),
            "version": VERSION,
        }
        return json.dumps({**body, "sha256": _digest(body)}, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_text(text: str, where: str) -> Manifest:
        """Read a manifest from JSON text; `where` names its file in errors.

        Raises DymoeError if the text is damaged or of another version.
        """
        data = parse_json(text, where, DAMAGED)
        version = data.pop("version", None)
        if type(version) is not int or not OLDEST <= version <= VERSION:
            raise DymoeError(
                f"{where}: version {str(version)[:60]}, this runtime reads {OLDEST} to {VERSION}; recompile or upgrade"
            )
        digest = data.pop("sha256", None)
        if digest != _digest({**data, "version": version}):
            raise DymoeError(f"{where}: does not match its own digest; {DAMAGED}")
        spec = spec_from_json(data.pop("spec", None), version, f"{where}: spec")
        parts = strict(_Parts, data, where, DAMAGED)
        if set(map(str, parts.layers)) != set(data["layers"]):
            raise DymoeError(f"{where}: a key of 'layers' is not the number of a layer; {DAMAGED}")
        try:
            manifest = Manifest(spec, **{**vars(parts), "ladder": check_ladder(parts.ladder), "digest": digest})
            _check_manifest(manifest, version)
        except ValueError as error:
            raise DymoeError(f"{where}: {error}; {DAMAGED}") from error
        return manifest


@dataclass(frozen=True)
class _Parts:
    """The keys of a manifest that are kept as they are."""

    ladder: tuple[int, ...]
    dense_bits: Mapping[str, int]
    files: Mapping[FileName, FileEntry]
    dense_crc32: Mapping[str, Word]
    layers: Mapping[int, LayerEntry]
    provenance: Mapping[str, Any]


def _check_manifest(manifest: Manifest, version: int) -> None:
    """Raise ValueError where parts of a manifest are each well formed, but do not fit each other.

    After it, sizes and loops are bounded by the sizes of the files, which `Bundle.open` compares with the disk.
    """
    spec, files, bits = manifest.spec, manifest.files, manifest.dense_bits
    for name in (POLICY, DENSE, LOOK_AHEAD, TOKENIZER):
        if name not in files:
            raise ValueError(f"'files' does not list {name}")
    if MANIFEST in files:
        raise ValueError(f"'files' lists {MANIFEST}")
    for name, file in files.items():
        if not file.sha256 and (version >= WHOLE or not manifest.is_weights(name)):
            raise ValueError(f"'files.{name}.sha256' is missing")
    for name, _ in spec.each_tensor():
        if name not in manifest.dense_crc32:
            raise ValueError(f"'dense_crc32.{name}' is missing")
    shapes = spec.tensor_shapes()
    if unknown := sorted(set(manifest.dense_crc32) - set(shapes)):
        raise ValueError(f"'dense_crc32.{unknown[0][:60]}' is not a tensor of the model")
    kinds = set(dense_kinds(spec))
    if set(bits) != kinds or not set(bits.values()) <= set(DENSE_BITS):
        raise ValueError(f"'dense_bits' do not give bits for {', '.join(sorted(kinds))}")
    needed = sum(dense_bytes(name, shape, bits) for name, shape in shapes.items())
    if needed > files[DENSE].nbytes:
        raise ValueError(f"the model has {needed} bytes of dense weights, {DENSE} only {files[DENSE].nbytes}")
    layout = expert_layout(spec, manifest.ladder)
    if set(manifest.layers) != set(spec.moe_layers):
        raise ValueError("'layers' are not those that have experts")
    if len({entry.file for entry in manifest.layers.values()}) != len(manifest.layers):
        raise ValueError("two 'layers' have the same file")
    for layer, entry in manifest.layers.items():
        _check_layer(f"'layers.{layer}'", entry, files, spec.num_experts, layout)


def _check_layer(
    where: str, entry: LayerEntry, files: Mapping[str, FileEntry], experts: int, layout: RecordLayout
) -> None:
    if entry.file not in files or not entry.file.endswith(".safetensors") or entry.file in (DENSE, LOOK_AHEAD):
        raise ValueError(f"{where} has no file of its own")
    if len(entry.crc32) != experts or any(len(row) != len(layout.ladder) for row in entry.crc32):
        raise ValueError(f"{where} lacks checksums of its experts")
    if entry.data_start % PAGE or files[entry.file].nbytes != entry.data_start + experts * layout.record_bytes:
        raise ValueError(f"{where}: records of {layout.record_bytes} bytes do not fit its file")


class Bundle:
    """An opened bundle. Opening checks the manifest, the size of each file, and the digests of small files."""

    def __init__(self, path: Path, manifest: Manifest, policy: Policy, storage: Storage | None = None) -> None:
        """Take what `open` has read; `storage` is the directory `path` if it is not given."""
        self.path = path
        self.storage = storage or Directory(path)
        self.manifest = manifest
        self.policy = policy
        self.spec = manifest.spec
        self.layout = expert_layout(manifest.spec, manifest.ladder)

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Bundle:
        """Open the bundle in the directory or the packed file `path`.

        Raises DymoeError naming the file if one is missing, damaged or of another version.

        >>> bundle = Bundle.open("build/demo.dymoe")
        >>> bundle.spec.num_experts, bundle.spec.top_k, bundle.manifest.ladder
        (16, 4, (2, 3, 4))
        """
        storage = _bundle_at(Path(path))
        manifest, where = _manifest_in(storage), str(storage.path / POLICY)
        bundle = Bundle(storage.path, manifest, Policy(manifest.ladder, (), (), ""), storage)
        for name in manifest.files:
            if manifest.is_weights(name):
                bundle.open_file(name).close()
            else:
                bundle.check_file(name)
        policy = Policy.from_json(parse_json(bundle.read(POLICY) or b"", where, DAMAGED), where)
        policy.check(where, manifest.ladder, [spec_experts(layer) for layer in manifest.spec.layers])
        return Bundle(storage.path, manifest, policy, storage)

    def open_file(self, name: str, flags: int = 0) -> Member:
        """Open a file that the manifest lists, with further `flags`; the caller closes it.

        Raises DymoeError unless it is a regular file of the size that the manifest says.
        """
        entry, member = self.manifest.files[name], self.storage.open(name, DAMAGED, flags)
        if member.nbytes != entry.nbytes:
            member.close()
            raise DymoeError(f"{self.path / name}: {member.nbytes} bytes of {entry.nbytes}; {DAMAGED}")
        return member

    def check_file(self, name: str) -> None:
        """Raise DymoeError unless a file has the size and the digest that the manifest says."""
        with closing(self.open_file(name)) as member:
            self._compare(name, member.sha256(DAMAGED))

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a small file, or None if the manifest does not list it.

        Raises DymoeError if it is missing, or these bytes do not have the digest that the manifest says.
        """
        if name not in self.manifest.files:
            return None
        with closing(self.open_file(name)) as member:
            data = member.read(DAMAGED)
        self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    def _compare(self, name: str, digest: str) -> None:
        if digest != self.manifest.files[name].sha256:
            raise DymoeError(f"{self.path / name}: does not match the manifest; {DAMAGED}")

    def unlisted(self) -> list[str]:
        """Return the names beside the bundle's files that the manifest does not list; nothing reads them."""
        return sorted(set(self.storage.names()) - {MANIFEST, *self.manifest.files})

    def record_span(self, key: ExpertKey) -> tuple[str, int]:
        """Return the name of the file with an expert's record, and the record's offset in that file in bytes."""
        entry = self.manifest.layers[key.layer]
        return entry.file, entry.data_start + key.expert * self.layout.record_bytes

    def expert_bytes(self) -> int:
        """Return the bytes of all expert records, padding included."""
        return self.spec.total_experts * self.layout.record_bytes

    def total_bytes(self) -> int:
        """Return the bytes of all files of the bundle, the manifest included."""
        with closing(self.storage.open(MANIFEST, DAMAGED)) as manifest:
            return sum(entry.nbytes for entry in self.manifest.files.values()) + manifest.nbytes


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """Return the JSON form of a specification: that of version 3 if it can hold the model, else of version 4."""
    plain = replace(spec, expert_grid="")
    if plain != _as_kept(plain):
        others = _kept((field.name, getattr(spec, field.name)) for field in fields(ModelSpec) if field.name != "layers")
        return {**others, "eos_ids": list(spec.eos_ids), **_layers_to_json(spec.layers)}
    attention = spec.layers[0].mixer
    assert isinstance(attention, AttentionSpec) and attention.rope is not None
    return {
        "model_type": spec.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_layers": spec.num_layers,
        "num_heads": attention.heads,
        "num_kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "max_context": spec.max_context,
        "norm_eps": spec.norm_eps,
        "rope": {name: value for name, value in _json_of(attention.rope).items() if name != "dims"},
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "norm_topk": spec.moe.router.normalize,
        "expert_width": spec.expert_width,
        "activation": spec.activation,
        "qk_norm": attention.qk_norm,
        "attention_bias": attention.bias,
        "clip_qkv": attention.clip,
        "sliding_window": attention.window,
        "dense_layers": [n for n in range(spec.num_layers) if not spec.is_moe(n)],
        "dense_width": spec.dense_width,
        "tie_embeddings": spec.tie_embeddings,
        "eos_ids": list(spec.eos_ids),
        **({"expert_grid": spec.expert_grid} if spec.expert_grid else {}),
    }


def spec_from_json(data: Any, version: int, where: str = "manifest.json: spec") -> ModelSpec:
    """Build a model's specification from the result of `spec_to_json`, in a manifest of `version`.

    Raises DymoeError, whose message starts with `where`, naming the key if one is unknown, missing or wrong.
    """
    if not isinstance(data, dict):
        raise DymoeError(f"{where}: missing, or not an object; {DAMAGED}")
    try:
        is_new = version == NEW_FORM or (version > NEW_FORM and "kinds" in data)
        return _from_kinds(data, where) if is_new else _from_kept(strict(_KeptSpec, data, where, DAMAGED))
    except ValueError as error:
        raise DymoeError(f"{where}: {error}; {DAMAGED}") from error


def _from_kinds(data: Mapping[str, Any], where: str) -> ModelSpec:
    values = {**data, "layers": data.get("kinds")}
    values.pop("kinds", None)
    spec = strict(ModelSpec, values, where, DAMAGED, _KINDS)
    order = data.get("layers")
    if not isinstance(order, list) or not 0 < len(order) <= MAX_LAYERS:
        raise ValueError("'layers' is not a list of layers")
    if not all(type(index) is int and 0 <= index < len(spec.layers) for index in order):
        raise ValueError("'layers': there is no such kind of layer")
    return replace(spec, layers=tuple(spec.layers[index] for index in order))


def _from_kept(kept: _KeptSpec) -> ModelSpec:
    if any(not 0 <= layer < kept.num_layers for layer in kept.dense_layers):
        raise ValueError("'dense_layers' has a layer that the model does not have")
    if len(kept.dense_layers) == kept.num_layers:
        raise ValueError("'dense_layers' has all layers")
    attention = AttentionSpec(
        kept.num_heads,
        kept.num_kv_heads,
        kept.head_dim,
        kept.rope,
        kept.sliding_window,
        kept.qk_norm,
        kept.attention_bias,
        kept.clip_qkv,
        kept.attention_bias,
    )
    moe = MoeSpec(RouterSpec(kept.num_experts, kept.top_k, kept.norm_topk), kept.expert_width)
    return ModelSpec(
        model_type=kept.model_type,
        vocab_size=kept.vocab_size,
        hidden_size=kept.hidden_size,
        max_context=kept.max_context,
        norm_eps=kept.norm_eps,
        layers=alike_layers(kept.num_layers, attention, moe, kept.dense_layers, kept.dense_width),
        activation=kept.activation,
        tie_embeddings=kept.tie_embeddings,
        eos_ids=kept.eos_ids,
        dense_width=kept.dense_width,
        expert_grid=kept.expert_grid,
    )


def _as_kept(spec: ModelSpec) -> ModelSpec | None:
    """Return the nearest model that version 3 can hold, or None if it can hold none like this."""
    attention, moe = spec.layers[0].mixer, spec.moe
    if not isinstance(attention, AttentionSpec) or attention.rope is None:
        return None
    rope = attention.rope
    plain = AttentionSpec(
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        rope if rope.kind in OLD_ROPES and not rope.dims else Rope(),
        attention.window,
        attention.qk_norm,
        attention.bias,
        attention.clip,
        attention.bias,
    )
    router = RouterSpec(moe.router.experts, moe.router.top_k, moe.router.normalize)
    dense = tuple(n for n in range(spec.num_layers) if not spec.is_moe(n))
    return ModelSpec(
        spec.model_type,
        spec.vocab_size,
        spec.hidden_size,
        spec.max_context,
        spec.norm_eps,
        alike_layers(spec.num_layers, plain, MoeSpec(router, moe.width), dense, spec.dense_width),
        spec.activation if spec.activation in ACTIVATIONS else "silu",
        spec.tie_embeddings,
        spec.eos_ids,
        spec.dense_width,
    )


def _layers_to_json(layers: Sequence[LayerSpec]) -> dict[str, Any]:
    """Return the JSON form of layers: `kinds`, each a different layer, and `layers`, the index of each one's kind."""
    kinds = list(dict.fromkeys(layers))
    return {"kinds": [_layer_to_json(kind) for kind in kinds], "layers": [kinds.index(layer) for layer in layers]}


def _layer_to_json(layer: LayerSpec) -> dict[str, Any]:
    halves = {"mixer": layer.mixer, "feed_forward": layer.feed_forward}
    kinds: dict[str, Any] = {name: {"kind": half.kind, **_json_of(half)} for name, half in halves.items()}
    return {**_json_of(layer), **kinds}


def _json_of(part: Any) -> dict[str, Any]:
    """Return the fields of a part of a specification, and those of its parts, without those that are left out."""
    return asdict(part, dict_factory=_kept)


def _kept(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields that are not left out."""
    return {name: value for name, value in items if name not in LEFT_OUT or value != LEFT_OUT[name]}


@dataclass(frozen=True, eq=False)
class _KeptSpec:
    """The keys of the older form that `spec_to_json` returns."""

    model_type: str
    vocab_size: Count
    hidden_size: Count
    num_layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    max_context: Count
    norm_eps: Factor
    num_experts: Count
    top_k: Count
    norm_topk: bool
    expert_width: Count
    rope: Rope
    activation: str = "silu"
    qk_norm: str = "none"
    attention_bias: bool = False
    clip_qkv: Positive | None = None
    sliding_window: Count | None = None
    dense_layers: tuple[Number, ...] = ()
    dense_width: Number = 0
    tie_embeddings: bool = False
    eos_ids: tuple[Number, ...] = ()
    expert_grid: str = ""


def expert_layout(spec: ModelSpec, ladder: tuple[int, ...]) -> RecordLayout:
    """Return the layout that all expert records of a model share."""
    return make_layout(spec.expert_shapes, ladder, vectors=spec.expert_vectors, grid=spec.expert_grid)


def dense_layout(shape: tuple[int, ...], bits: int) -> RecordLayout:
    """Return the layout of a quantized dense matrix: a record of one matrix `weight` with a single tier.

    Its segment is not padded to whole pages.
    """
    return make_layout({"weight": (shape[0], shape[1])}, (bits,), page=1)


def dense_kind(name: str, shape: tuple[int, ...]) -> str | None:
    """Return the kind of a dense matrix (embed, lm_head, attn, delta, mlp or shared), or None if it stays float32.

    Matrices of one kind share their bits.
    """
    if len(shape) != 2 or is_exact(name):
        return None
    return name.split(".")[2] if name.startswith("layers.") else name


def dense_kinds(spec: ModelSpec) -> list[str]:
    """Return the kinds of dense matrices that a model has, in the order of its tensors."""
    kinds = (dense_kind(name, shape) for name, shape in spec.each_tensor())
    return list(dict.fromkeys(kind for kind in kinds if kind is not None))


def quantized_bits(name: str, shape: tuple[int, ...], dense_bits: Mapping[str, int]) -> int | None:
    """Return the bits of a quantized dense tensor, or None if it is not quantized.

    Norms, biases, routers and kinds at 16 bits are not quantized.
    """
    kind = dense_kind(name, shape)
    return dense_bits[kind] if kind is not None and dense_bits[kind] <= 8 else None


def stored_as(name: str, shape: tuple[int, ...], dense_bits: Mapping[str, int]) -> Stored:
    """Return the type and the shape that a dense tensor has in its file."""
    if bits := quantized_bits(name, shape, dense_bits):
        return "U8", (dense_layout(shape, bits).record_bytes,)
    return ("BF16" if dense_kind(name, shape) else "F32"), shape


def dense_bytes(name: str, shape: tuple[int, ...], dense_bits: Mapping[str, int]) -> int:
    """Return the bytes of a dense tensor in a bundle."""
    dtype, stored = stored_as(name, shape, dense_bits)
    return math.prod(stored) * {"U8": 1, "BF16": 2, "F32": 4}[dtype]


def spec_experts(layer: LayerSpec) -> int:
    """Return the number of experts of a layer, 0 for one without any."""
    return layer.feed_forward.router.experts if isinstance(layer.feed_forward, MoeSpec) else 0


def record_name(key: ExpertKey) -> str:
    """Return the name of an expert's record in its file."""
    return f"experts.{key}"


def layer_file(index: int) -> str:
    """Return the name of the file with the records of MoE layer `index`, counted among MoE layers only."""
    return f"experts-{index:05d}.safetensors"


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the bundle in the directory or packed file `path`.

    Raises DymoeError if there is none, or none that this runtime can read.
    """
    return _manifest_in(_bundle_at(path))


def _bundle_at(path: Path) -> Storage:
    if not path.is_dir() and not path.is_file():
        what = "neither a directory nor a file" if path.exists() else "no such bundle"
        raise DymoeError(f"{path}: {what}; make one with dymoe-compile MODEL -o {path}")
    return open_storage(path)


def _manifest_in(storage: Storage) -> Manifest:
    path = storage.path / MANIFEST
    if not storage.holds(MANIFEST):
        raise DymoeError(f"{path}: no such file; {storage.path} is not a bundle, or damaged: recompile it")
    data = read_bounded(storage, MANIFEST, DAMAGED, MAX_JSON_BYTES)
    try:
        return Manifest.from_text(data.decode(), str(path))
    except UnicodeDecodeError as error:
        raise DymoeError(f"{path}: not valid UTF-8; {DAMAGED}") from error


def file_entry(path: Path, digest: bool) -> FileEntry:
    """Return the manifest entry of a file, with its SHA-256 if `digest` is true."""
    with closing(Directory(path.parent).open(path.name, "check the disk")) as member:
        return FileEntry(member.nbytes, member.sha256("check the disk") if digest else "")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

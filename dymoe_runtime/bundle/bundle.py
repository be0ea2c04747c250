"""A bundle on disk: manifest.json, policy.json, tokenizer, dense weights, and one file of records per MoE layer.

`Bundle.open` reads and checks the small files. `records.py` reads and checks weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dymoe_runtime.bundle.policy import Policy
from dymoe_runtime.bundle.tiers import RecordLayout, check_ladder, make_layout
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json, read_text, strict
from dymoe_runtime.spec import (
    ACTIVATIONS,
    AttentionSpec,
    ExpertKey,
    GatedDeltaSpec,
    LayerSpec,
    MixerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    Rope,
    RouterSpec,
    SharedSpec,
    alike_layers,
    is_exact,
)

# Versions of the format. A bundle is written in the oldest one that can hold its model.
VERSION, OLDEST = 4, 3
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
# Kinds of mixers that a bundle can hold.
_MIXERS: dict[str, type] = {spec.kind: spec for spec in (AttentionSpec, GatedDeltaSpec)}
DAMAGED = "the bundle is damaged: copy it again, or compile it again with --fresh"
# Bits that a kind of dense matrices may have: 16 is bf16, fewer is quantized.
DENSE_BITS = (4, 5, 6, 7, 8, 16)
MANIFEST = "manifest.json"
POLICY = "policy.json"
FINDINGS = "compile.json"
REPORT = "report.html"
LOOK_AHEAD = "look_ahead.safetensors"
DENSE = "dense.safetensors"
TOKENIZER = "tokenizer.json"
# Copied next to the tokenizer if the checkpoint has them.
TOKENIZER_EXTRAS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class FileEntry:
    """The size of a file of the bundle, and the digest of a small one.

    `sha256` is empty for weights, which have a CRC-32 for each dense tensor and each segment of a record.
    """

    nbytes: int
    sha256: str = ""


@dataclass(frozen=True)
class LayerEntry:
    """The records of one layer: the record of expert e starts at data_start + e * record_bytes of `file`."""

    file: str
    data_start: int
    crc32: tuple[tuple[int, ...], ...]  # [experts][segments], each over a segment and its padding


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
    # Digest of all other keys in the file, and so of the bundle; "" unless it was read from one.
    sha256: str = field(default="", compare=False)

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
            "version": format_version(self.spec),
        }
        return json.dumps({**body, "sha256": _digest(body)}, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_text(text: str, where: str) -> Manifest:
        """Read a manifest from JSON text; `where` names its file in errors.

        Raises DymoeError if the text is damaged or of another version.
        """
        data = parse_json(text, where, DAMAGED)
        version = data.pop("version", None)
        if version not in (OLDEST, VERSION):
            raise DymoeError(
                f"{where}: version {version}, this runtime reads {OLDEST} and {VERSION}; recompile or upgrade"
            )
        digest = data.pop("sha256", None)
        if digest != _digest({**data, "version": version}):
            raise DymoeError(f"{where}: does not match its own digest; {DAMAGED}")
        data["sha256"] = digest
        data["spec"] = spec_from_json(data["spec"], version)
        data["ladder"] = check_ladder(data["ladder"])
        data["files"] = {name: strict(FileEntry, entry, where) for name, entry in data["files"].items()}
        data["layers"] = {int(layer): _layer_entry(entry, where) for layer, entry in data["layers"].items()}
        manifest: Manifest = strict(Manifest, data, where)
        kinds = set(dense_kinds(manifest.spec))
        if set(manifest.dense_bits) != kinds or not set(manifest.dense_bits.values()) <= set(DENSE_BITS):
            raise DymoeError(f"{where}: dense_bits do not give bits for {', '.join(sorted(kinds))}; {DAMAGED}")
        return manifest


class Bundle:
    """An opened bundle. Opening checks the manifest, the size of each file, and the digests of small files."""

    def __init__(self, path: Path, manifest: Manifest, policy: Policy) -> None:
        """Take what `open` has read."""
        self.path = path
        self.manifest = manifest
        self.policy = policy
        self.spec = manifest.spec
        self.layout = expert_layout(manifest.spec, manifest.ladder)

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Bundle:
        """Open the bundle in directory `path`.

        Raises DymoeError naming the file if one is missing, damaged or of another version.

        >>> bundle = Bundle.open("build/demo.dymoe")
        >>> bundle.spec.num_experts, bundle.spec.top_k, bundle.manifest.ladder
        (16, 4, (2, 3, 4))
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        for name, entry in manifest.files.items():
            _check_file(directory / name, entry)
        text = read_text(directory / POLICY, DAMAGED)
        policy = Policy.from_json(parse_json(text, str(directory / POLICY), DAMAGED))
        _check_shapes(manifest, policy, directory)
        return Bundle(directory, manifest, policy)

    def record_span(self, key: ExpertKey) -> tuple[Path, int]:
        """Return the file of an expert's record, and the record's offset in that file in bytes."""
        entry = self.manifest.layers[key.layer]
        return self.path / entry.file, entry.data_start + key.expert * self.layout.record_bytes

    def expert_bytes(self) -> int:
        """Return the bytes of all expert records, padding included."""
        return self.spec.total_experts * self.layout.record_bytes

    def total_bytes(self) -> int:
        """Return the bytes of all files of the bundle, the manifest included."""
        return sum(entry.nbytes for entry in self.manifest.files.values()) + (self.path / MANIFEST).stat().st_size


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """Return the JSON form of a model's specification in version `format_version(spec)` of the format."""
    if format_version(spec) == VERSION:
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
    }


def format_version(spec: ModelSpec) -> int:
    """Return the version of the format in which a model is kept: the oldest one that can hold it.

    Version 3 knows one attention for all layers, and softmax routers.
    """
    return VERSION if spec != _as_kept(spec) else OLDEST


def spec_from_json(data: Mapping[str, Any], version: int) -> ModelSpec:
    """Build a model's specification from the result of `spec_to_json`.

    Raises DymoeError naming the key if one is unknown or missing.
    """
    where = "manifest.json: spec"
    if version == VERSION:
        values = {name: value for name, value in data.items() if name != "kinds"}
        values |= {"layers": _layers_from_json(data, where), "eos_ids": tuple(data["eos_ids"])}
        spec: ModelSpec = strict(ModelSpec, values, where)
        return spec
    kept: _KeptSpec = strict(_KeptSpec, data, where)
    rope: Rope = strict(Rope, kept.rope, f"{where}.rope")
    attention = AttentionSpec(
        kept.num_heads,
        kept.num_kv_heads,
        kept.head_dim,
        rope,
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
        eos_ids=tuple(kept.eos_ids),
        dense_width=kept.dense_width,
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


def _layers_from_json(data: Mapping[str, Any], where: str) -> tuple[LayerSpec, ...]:
    """Return the layers of the result of `_layers_to_json`; raise DymoeError that names `where` if it is malformed."""
    kinds = [_layer_from_json(kind, f"{where}.kinds") for kind in data["kinds"]]
    if not all(type(index) is int and 0 <= index < len(kinds) for index in data["layers"]):
        raise DymoeError(f"{where}.layers: there is no such kind of layer")
    return tuple(kinds[index] for index in data["layers"])


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


def _layer_from_json(data: Mapping[str, Any], where: str) -> LayerSpec:
    values = {**data, "mixer": _mixer(data["mixer"], where), "feed_forward": _feed_forward(data["feed_forward"], where)}
    layer: LayerSpec = strict(LayerSpec, values, where)
    return layer


def _mixer(data: Mapping[str, Any], where: str) -> MixerSpec:
    kind, values = _kind_of(data)
    if kind not in _MIXERS:
        raise DymoeError(f"{where}: the mixer '{kind}' is not known; upgrade, or compile the model again")
    if values.get("rope") is not None:
        factors = {name: tuple(values["rope"].get(name, ())) for name in ("short_factors", "long_factors")}
        values["rope"] = strict(Rope, {**values["rope"], **factors}, where)
    if values.get("temperature") is not None:
        values["temperature"] = tuple(values["temperature"])
    mixer: MixerSpec = strict(_MIXERS[kind], values, where)
    return mixer


def _feed_forward(data: Mapping[str, Any], where: str) -> MoeSpec | MlpSpec:
    kind, values = _kind_of(data)
    if kind not in (MoeSpec.kind, MlpSpec.kind):
        raise DymoeError(f"{where}: the feed-forward part '{kind}' is not known; upgrade, or compile the model again")
    if kind == MoeSpec.kind:
        values["router"] = strict(RouterSpec, values["router"], where)
        if values.get("shared") is not None:
            values["shared"] = strict(SharedSpec, values["shared"], where)
    part: MoeSpec | MlpSpec = strict(MoeSpec if kind == MoeSpec.kind else MlpSpec, values, where)
    return part


def _kind_of(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return str(data["kind"]), {name: value for name, value in data.items() if name != "kind"}


@dataclass(frozen=True, eq=False)
class _KeptSpec:
    """The keys that `spec_to_json` returns."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    num_experts: int
    top_k: int
    norm_topk: bool
    expert_width: int
    rope: Mapping[str, Any]
    activation: str = "silu"
    qk_norm: str = "none"
    attention_bias: bool = False
    clip_qkv: float | None = None
    sliding_window: int | None = None
    dense_layers: tuple[int, ...] = ()
    dense_width: int = 0
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()


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


def record_name(key: ExpertKey) -> str:
    """Return the name of an expert's record in its file."""
    return f"experts.{key}"


def layer_file(index: int) -> str:
    """Return the name of the file with the records of MoE layer `index`, counted among MoE layers only."""
    return f"experts-{index:05d}.safetensors"


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of the bundle in `directory`.

    Raises DymoeError if there is none, or none that this runtime can read.
    """
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
    """Return the manifest entry of a file, with its SHA-256 if `digest` is true."""
    data_digest = hashlib.sha256(path.read_bytes()).hexdigest() if digest else ""
    return FileEntry(path.stat().st_size, data_digest)


def _check_file(path: Path, entry: FileEntry) -> None:
    if not path.exists():
        raise DymoeError(f"{path}: missing; {DAMAGED}")
    if path.stat().st_size != entry.nbytes:
        raise DymoeError(f"{path}: {path.stat().st_size} bytes of {entry.nbytes}; {DAMAGED}")
    if entry.sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != entry.sha256:
        raise DymoeError(f"{path}: does not match the manifest; {DAMAGED}")


def _check_shapes(manifest: Manifest, policy: Policy, directory: Path) -> None:
    """Raise DymoeError where manifest and policy are each well formed, but do not fit the model or each other."""
    spec, segments = manifest.spec, len(manifest.ladder)
    for layer in spec.moe_layers:
        checksums = manifest.layers[layer].crc32 if layer in manifest.layers else ()
        if len(checksums) != spec.num_experts or any(len(row) != segments for row in checksums):
            raise DymoeError(f"{directory / MANIFEST}: layer {layer} lacks checksums of its experts; {DAMAGED}")
    rows = [row for point in policy.points for row in (*point.decode, *point.prefill)]
    layers = {len(thresholds) for point in policy.points for thresholds in (point.decode, point.prefill)}
    fits = layers == {spec.num_layers} == {len(policy.layers)} and {len(row) for row in rows} == {segments}
    if set(manifest.layers) != set(spec.moe_layers) or policy.ladder != manifest.ladder or not fits:
        raise DymoeError(f"{directory / POLICY}: does not fit the model of {MANIFEST}; {DAMAGED}")


def _layer_entry(entry: Mapping[str, Any], where: str) -> LayerEntry:
    values = {**entry, "crc32": tuple(tuple(row) for row in entry.get("crc32", ()))}
    layer: LayerEntry = strict(LayerEntry, values, where)
    return layer


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

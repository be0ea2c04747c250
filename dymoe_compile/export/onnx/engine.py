"""The files with which onnxruntime-genai runs an exported model: its configuration, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dymoe_compile.export.onnx.attention import PAST, PRESENT, is_fused
from dymoe_compile.export.onnx.decoder import LOGITS
from dymoe_compile.export.onnx.sequence import IDS, MASK
from dymoe_runtime.bundle.bundle import TOKENIZER, TOKENIZER_EXTRAS, Bundle
from dymoe_runtime.spec import AttentionSpec, ModelSpec
from dymoe_runtime.text.tokenizer import Tokenizer

CONFIG, MODEL, TOKENIZER_CONFIG = "genai_config.json", "model.onnx", "tokenizer_config.json"
# What the engine calls a decoder of no family that it knows.
TYPE = "decoder"
# Classes of tokenizers that the engine (0.18) knows, with "Fast" behind them or not; and the one for all others.
CLASSES = {
    *("CLIPTokenizer", "CodeGenTokenizer", "CodeLlamaTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "GemmaTokenizer"),
    *("LlamaTokenizer", "Phi3Tokenizer", "PreTrainedTokenizer", "Qwen2Tokenizer", "T5Tokenizer", "TokenizersBackend"),
    "XLMRobertaTokenizer",
}
ANY_CLASS = "PreTrainedTokenizerFast"


def write_engine_files(bundle: Bundle, directory: Path, context: int, portable: bool) -> None:
    """Write the engine's configuration and the tokenizer's files of `bundle` to `directory`.

    Raises DymoeError if a file of the tokenizer is damaged.
    """
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    for name in (TOKENIZER, *TOKENIZER_EXTRAS):
        if (data := bundle.read(name)) is not None:
            (directory / name).write_bytes(data)
    _write_json(directory / TOKENIZER_CONFIG, tokenizer_config(bundle.read(TOKENIZER_CONFIG)))
    _write_json(directory / CONFIG, engine_config(bundle.spec, tokenizer, context, portable))


def tokenizer_config(data: bytes | None) -> dict[str, Any]:
    """Return a tokenizer's configuration as the engine takes it, from that of the bundle, if it has one.

    The engine wants a file, a class that it knows, and one chat template. tokenizer.json says all about the tokens.
    """
    values: dict[str, Any] = {} if data is None else json.loads(data)
    if str(values.get("tokenizer_class")).removesuffix("Fast") not in CLASSES:
        values["tokenizer_class"] = ANY_CLASS
    templates = values.get("chat_template")
    if isinstance(templates, list):
        by_name = {entry["name"]: entry["template"] for entry in templates}
        values["chat_template"] = by_name.get("default", next(iter(by_name.values()), ""))
    return values


def engine_config(spec: ModelSpec, tokenizer: Tokenizer, context: int, portable: bool) -> dict[str, Any]:
    """Return the content of the engine's configuration file."""
    attention = spec.layers[0].mixer
    assert isinstance(attention, AttentionSpec)
    ends = sorted(tokenizer.eos_ids)
    past, present = (
        {f"{when}_{part}_names": pattern.format(layer="%d", part=part) for part in ("key", "value")}
        for when, pattern in (("past", PAST), ("present", PRESENT))
    )
    decoder = {
        "filename": MODEL,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "hidden_size": spec.hidden_size,
        "head_size": attention.head_dim,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "num_hidden_layers": spec.num_layers,
        "inputs": {"input_ids": IDS, "attention_mask": MASK, **past},
        "outputs": {"logits": LOGITS, **present},
    }
    model = {
        "type": TYPE,
        "vocab_size": spec.vocab_size,
        "context_length": context,
        "eos_token_id": ends,
        "pad_token_id": ends[0] if ends else 0,
        "decoder": decoder,
    }
    if tokenizer.bos_id is not None:
        model["bos_token_id"] = tokenizer.bos_id
    return {"model": model, "search": _search(spec, tokenizer, context, portable)}


def caches_alike(spec: ModelSpec) -> bool:
    """Return whether the KV caches of all layers have the same shape, which is what the engine's configuration says."""
    return len({(m.kv_heads, m.head_dim) for layer in spec.layers if isinstance(m := layer.mixer, AttentionSpec)}) == 1


def _search(spec: ModelSpec, tokenizer: Tokenizer, context: int, portable: bool) -> dict[str, Any]:
    """Return how the engine generates: as the model's generation_config.json says."""
    sampling = tokenizer.sampling
    fused = all(isinstance(m := layer.mixer, AttentionSpec) and is_fused(m) for layer in spec.layers)
    search: dict[str, Any] = {
        "do_sample": not sampling.greedy,
        "max_length": context,
        # Keys and values stay where they are, which only GroupQueryAttention can do.
        "past_present_share_buffer": fused and not portable,
        "repetition_penalty": sampling.repetition_penalty,
    }
    if not sampling.greedy:
        search |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return search


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

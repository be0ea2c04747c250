"""How text is split before merging: llama.cpp's names for the regular expressions of tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers.models import BPE

from dymoe_runtime.errors import DymoeError

# The expression that `ByteLevel` has by itself, that of GPT-2.
BYTE_LEVEL = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HAN = r"[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Regular expressions, which split one after another -> llama.cpp's name for them.
SPLITS = {
    (BYTE_LEVEL,): "gpt-2",
    (DIGIT, BYTE_LEVEL): "starcoder",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",): "qwen2",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (rf"{_CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_REST_SLASH}",): "gpt-4o",
    (rf"{_CASED % ('', '')}|\p{{N}}|{_REST_SLASH}",): "tekken",
    (r"\p{N}{1,3}", _HAN, _DEEPSEEK): "deepseek-v3",
}
# Of those names, the ones with which llama.cpp takes whole words from the vocabulary before it merges.
WHOLE_WORDS = {"llama-bpe", "tekken"}


def split_name(tokenizer: Mapping[str, Any], has_merges: bool) -> str:
    """Return llama.cpp's name for the way in which a tokenizer.json splits text.

    Without merges, every way gives the same tokens. Raises DymoeError if llama.cpp has no such way.
    """
    name = "gpt-2" if not has_merges else SPLITS.get(expressions_of(tokenizer.get("pre_tokenizer")))
    if name is None:
        raise DymoeError(
            "tokenizer.json: splits text in a way that has no name in llama.cpp, or none known here; "
            "export with --format onnx"
        )
    model = tokenizer["model"]
    if has_merges and bool(model.get("ignore_merges")) != (name in WHOLE_WORDS) and not merges_reach_all(model):
        raise DymoeError(
            f"tokenizer.json: 'ignore_merges' differs from what llama.cpp does for tokenizers that split as {name}, "
            "and has an effect; export with --format onnx"
        )
    return name


def merges_reach_all(model: Mapping[str, Any]) -> bool:
    """Return whether merges make each token of a BPE, so that it does not matter whether they are ignored for words."""
    halves = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [(str(first), str(second)) for first, second in halves]
    merging = BPE(vocab=model["vocab"], merges=merges, ignore_merges=False)
    return all(len(merging.tokenize(text)) == 1 for text in model["vocab"])


def expressions_of(pre_tokenizer: Any) -> tuple[str, ...]:
    """Return the regular expressions that a pre-tokenizer applies, in order; `?` for what is none."""
    found = []
    for step in steps_of(pre_tokenizer):
        kind = step["type"]
        if kind == "ByteLevel":
            found += [BYTE_LEVEL] if step.get("use_regex", True) else []
            found += ["?"] if step.get("add_prefix_space") else []
        elif kind == "Digits":
            found.append(DIGIT if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and _isolates(step):
            pattern = step.get("pattern", {})
            found.append(str(pattern.get("Regex", "?")))
        else:
            found.append("?")
    return tuple(found)


def steps_of(part: Any, inside: str = "pretokenizers") -> list[Mapping[str, Any]]:
    """Return the steps of a pre-tokenizer or normalizer of tokenizer.json, which may be a sequence of sequences."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for each in part.get(inside, ()) for step in steps_of(each, inside)]
    return [part]


def _isolates(step: Mapping[str, Any]) -> bool:
    """Return whether a split keeps both what matches and what is between matches, each as a piece of its own."""
    behavior, inverted = str(step.get("behavior")), bool(step.get("invert"))
    return (behavior == "Isolated" and not inverted) or (behavior == "Removed" and inverted)

"""The limits of what a tokenizer.json may ask for, checked before the library `tokenizers` reads it.

The library trusts such files: some end the process, take all memory, or never end. So every part of a file is of a
known kind, and what makes a text longer is limited. How long a regular expression takes is limited by the library.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any

import msgspec
import tokenizers
from msgspec import Meta, Raw

from dymoe_runtime.files import parse_json

# The most parts of a file, and the longest regular expression; known ones have about 10 and 2,500 characters.
MAX_PARTS, MAX_REGEX = 64, 20_000
# The longest token of a kind that is kept as a tree, whose depth takes stack.
MAX_PIECE = 1000
# How many times longer a text, or an answer, may become.
MAX_GROWTH = 64
# Characters of a text that a part adds to another one, and tokens that are added to a prompt.
MAX_ADDED_TEXT, MAX_ADDED_IDS = 1000, 1000
# The most characters of all added tokens, once they have grown; finding them takes about 80 bytes for each.
MAX_ADDED_TOKENS = 4 << 20
# What a pattern must not find an empty match in, where matches are replaced.
SAMPLE = "".join(map(chr, range(9, 127))) + "\u00e9\u4e2d\u2581 \n\n"

# Part of the file -> the key under which a sequence of its kind has its parts.
SEQUENCES = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
# Kinds that need no check: they have no parameter that is a danger, and make no text longer.
HARMLESS = {
    "normalizer": ("BertNormalizer", "Strip", "StripAccents", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt"),
    "pre_tokenizer": (
        *("BertPreTokenizer", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "UnicodeScripts"),
        *("Whitespace", "WhitespaceSplit"),
    ),
    "post_processor": ("BertProcessing", "ByteLevel", "RobertaProcessing"),
    "decoder": ("BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "WordPiece"),
}
MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")

Piece = tuple[Annotated[str, Meta(max_length=MAX_PIECE)], float]


def checked(text: str) -> str:
    """Return a tokenizer.json that has each key once, and whose parts are within the limits.

    Raises ValueError, with the part in its message, if one is not.
    """
    values = msgspec.json.decode(text, type=dict[str, Raw])
    model = msgspec.json.decode(values.get("model", b"{}"), type=dict[str, Raw])
    _check_model({name: model[name] for name in model.keys() - {"merges"}})
    normalizer = _value(values.get("normalizer"))
    grown = {place: _growth(place, _value(values.get(place))) for place in SEQUENCES}
    _expect(grown["normalizer"] * grown["pre_tokenizer"] <= MAX_GROWTH, "normalizer: it makes texts too long")
    added = _value(values.get("added_tokens"))
    _expect(added is None or isinstance(added, list), "added_tokens: not a list")
    check_added([str(token.get("content")) for token in added or () if isinstance(token, dict)], normalizer)
    return msgspec.json.encode({**values, "model": model}).decode()


def check_added(texts: Collection[str], normalizer: Any) -> None:
    """Raise ValueError if added tokens of these texts are too long once `normalizer`, which may be None, has run."""
    characters = sum(len(text) + 1 for text in texts)
    _expect(characters * _growth("normalizer", normalizer) <= MAX_ADDED_TOKENS, "added tokens: they are too long")


def _value(raw: Raw | None) -> Any:
    """Return a value of JSON whose objects have each key once."""
    return None if raw is None else parse_json(b'{"it":' + bytes(raw) + b"}", "a part", "").get("it")


def _growth(place: str, part: Any) -> float:
    """Return how many times longer a part of the file can make a text; raise ValueError unless it is within limits."""
    parts = list(_parts(place, part))
    _expect(len(parts) <= MAX_PARTS, f"{place}: more than {MAX_PARTS} parts")
    growth = math.prod(_check_part(place, each) for each in parts)
    _expect(growth <= MAX_GROWTH, f"{place}: it makes texts too long")
    return growth


def _parts(place: str, part: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of a sequence, and of those in it, or the only one."""
    if part is None:
        return
    _expect(isinstance(part, dict), f"{place}: not an object")
    if part.get("type") != "Sequence":
        yield part
        return
    inner = part.get(SEQUENCES[place])
    _expect(isinstance(inner, list), f"{place}: a sequence without parts")
    for each in inner:
        yield from _parts(place, each)


def _check_part(place: str, part: Mapping[str, Any]) -> float:
    """Raise ValueError unless a part is within the limits; return how many times longer it can make a text."""
    kind = part.get("type")
    if kind in HARMLESS[place]:
        return 1
    check = CHECKS.get((place, kind)) if isinstance(kind, str) else None
    if check is None:
        raise ValueError(f"{place}: the kind {str(kind)[:60]!r} is not known")
    try:
        return check(part)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place}: {kind} is malformed") from error
    except ValueError as error:
        raise ValueError(f"{place}: {kind}: {error}") from error


def _check_model(model: Mapping[str, Raw]) -> None:
    kind = _value(model.get("type"))
    _expect(kind is None or kind in MODELS, f"model: the kind {str(kind)[:60]!r} is not known")
    prefix = _value(model.get("continuing_subword_prefix"))
    _expect(kind == "WordPiece" or not prefix, "model: 'continuing_subword_prefix' is not supported")
    for name in ("end_of_word_suffix", "continuing_subword_prefix"):
        _expect(len(str(_value(model.get(name)))) <= MAX_ADDED_TEXT, f"model: '{name}' is too long")
    longest = _value(model.get("max_input_chars_per_word"))
    _expect(longest is None or (type(longest) is int and longest <= MAX_PIECE), "model: its words are too long")
    if kind == "Unigram" or bytes(model.get("vocab", b"")).lstrip()[:1] == b"[":
        msgspec.json.decode(model.get("vocab", b"[]"), type=list[Piece])


def _replace(part: Mapping[str, Any]) -> float:
    content: str = part["content"]
    ((kind, pattern),) = part["pattern"].items()
    _expect(bool(pattern), "an empty pattern")
    if kind == "String":
        return max(1.0, len(content) / len(pattern))
    found = tokenizers.NormalizedString(SAMPLE).split(_regex(pattern), "isolated")
    _expect(all(piece.normalized for piece in found), "its pattern matches an empty text")
    return max(1.0, float(len(content)))


def _split(part: Mapping[str, Any]) -> float:
    ((kind, pattern),) = part["pattern"].items()
    if kind == "Regex":
        _regex(pattern)
    return 1


def _regex(pattern: str) -> tokenizers.Regex:
    _expect(len(pattern) <= MAX_REGEX, "its pattern is too long")
    try:
        return tokenizers.Regex(pattern)
    except Exception as error:  # the library raises no narrower type
        raise ValueError(str(error)) from error


def _prepend(part: Mapping[str, Any]) -> float:
    _expect(len(part["prepend"]) <= MAX_ADDED_TEXT, "its text is too long")
    return 1


def _twice(part: Mapping[str, Any]) -> float:
    return 2  # a character becomes one for each of its bytes, which have two at most


def _fixed_length(part: Mapping[str, Any]) -> float:
    _expect(part["length"] >= 1, "its length is 0")
    return 1


def _template(part: Mapping[str, Any]) -> float:
    pieces = [(kind, value["id"]) for piece in part["single"] for kind, value in piece.items()]
    _expect([name for kind, name in pieces if kind == "Sequence"] == ["A"], "it does not hold the text once")
    ids = {name: len(token["ids"]) for name, token in part["special_tokens"].items()}
    _expect(sum(ids.get(name, 0) for _, name in pieces) <= MAX_ADDED_IDS, "it adds too many tokens")
    return 1


def _strip(part: Mapping[str, Any]) -> float:
    _expect(part["stop"] == 0, "'stop' is not supported")
    return 1


def _precompiled(part: Mapping[str, Any]) -> float:
    """Check a map of SentencePiece: bytes of a tree, the tree as a double array (Darts), and texts that end in 0."""
    import numpy as np

    try:
        data = base64.b64decode(part["precompiled_charsmap"], validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
    size = int.from_bytes(data[:4], "little")
    _expect(0 < size <= len(data) - 4 and size % 1024 == 0, "its size is wrong")
    units, texts = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64), data[4 + size :]
    inner = units >> 31 == 0
    next_units = (np.arange(len(units)) ^ (units >> 10 << ((units & 512) >> 6)))[inner]
    _expect(bool((next_units | 255 < len(units)).all()), "its tree leads out of it")
    found = units[next_units[units[inner] >> 8 & 1 == 1]] & 0x7FFFFFFF
    starts = {0, *(at + 1 for at, byte in enumerate(texts) if not byte)} - {len(texts)}
    _expect(set(found.tolist()) <= starts and texts[-1:] == b"\0", "its texts are not those of its tree")
    return float(max(1, *map(len, texts.decode().split("\0"))))


CHECKS: dict[tuple[str, str], Callable[[Mapping[str, Any]], float]] = {
    ("normalizer", "ByteLevel"): _twice,
    ("normalizer", "Precompiled"): _precompiled,
    ("normalizer", "Prepend"): _prepend,
    ("normalizer", "Replace"): _replace,
    ("pre_tokenizer", "ByteLevel"): _twice,
    ("pre_tokenizer", "FixedLength"): _fixed_length,
    ("pre_tokenizer", "Split"): _split,
    ("post_processor", "TemplateProcessing"): _template,
    ("decoder", "Replace"): _replace,
    ("decoder", "Strip"): _strip,
}


def _expect(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)

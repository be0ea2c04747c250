"""Tokens that a model's other files add to its tokenizer.json, added as transformers adds them.

Saved tokenizers say it in three ways, from the newest to the oldest: `added_tokens_decoder` in tokenizer_config.json,
which stands alone; special_tokens_map.json, whose names replace those of tokenizer_config.json; and added_tokens.json,
which maps texts to ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.storage import read_member
from dymoe_runtime.text.tokenizer_check import check_added
from dymoe_runtime.text.tokenizer_files import CONFIG, RESTORE, TOKENIZER, load_backend, read_object, refusing

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Special tokens without a name of their own: a list, or an object that names them. The second key is the older one.
OTHERS, OTHERS_BEFORE = "extra_special_tokens", "additional_special_tokens"
BY_ID = "added_tokens_decoder"
MAP, IDS = "special_tokens_map.json", "added_tokens.json"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def add_tokens(backend: tokenizers.Tokenizer, directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Add to `backend` the tokens that the files in `directory` declare; return name -> text of the special tokens.

    `config` is what tokenizer_config.json holds. A text may be empty, which means that there is no such token. Raises
    DymoeError if a file says another id for a token than `backend` has, or if bos or eos is not in the vocabulary.
    """
    beside = {} if config.get(BY_ID) is not None else read_object(directory / MAP)
    where = directory / (MAP if beside else CONFIG)
    named, others, late = _special_tokens(config, beside, where)
    special = {str(token) for name, token in named.items() if name in SPECIAL_TOKENS} | {*map(str, others)}
    declared = _declared(backend, directory, config, special)
    names = {str(token) for token in named.values()}
    _add(backend, (_as_special(token, names) for _, token in sorted(declared.items(), key=lambda item: item[0])))
    _check_ids(backend, declared, directory / (IDS if config.get(BY_ID) is None else CONFIG))
    for name in ("bos_token", "eos_token"):
        if name in named and str(named[name]) and backend.token_to_id(str(named[name])) is None:
            raise DymoeError(f"{directory / TOKENIZER}: no token is the {name} {str(named[name])!r}; {RESTORE}")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    _add(backend, (token for token in (*named.values(), *others, *late) if str(token) not in known))
    return {name: str(token) for name, token in named.items()}


def whole_tokenizer(directory: Path) -> bytes:
    """Return a tokenizer.json that needs no other file for its tokens; the file itself if it is one.

    Raises DymoeError as `add_tokens` does.
    """
    backend = load_backend(directory)
    before = _states(backend)
    add_tokens(backend, directory, read_object(directory / CONFIG))
    after, data = _states(backend), read_member(directory / TOKENIZER, RESTORE) or b""
    if after == before:
        return data
    values = json.loads(data)
    values["added_tokens"] = [{"id": token_id, **state} for token_id, state in sorted(after.items())]
    return json.dumps(values, ensure_ascii=False, indent=2).encode()


def _special_tokens(
    config: Mapping[str, Any], beside: Mapping[str, Any], where: Path
) -> tuple[dict[str, AddedToken], list[AddedToken], list[AddedToken]]:
    """Return name -> token of the special tokens, those of SPECIAL_TOKENS first, and the tokens without a name.

    The last ones are those of special_tokens_map.json by the older key: they make no other token special.
    """
    values, named = dict(config), dict[str, Any]()
    if OTHERS_BEFORE in values and not values.get(OTHERS):
        values[OTHERS] = values.pop(OTHERS_BEFORE)
    for source in (values, beside):
        if isinstance(source.get(OTHERS), Mapping):
            named |= source[OTHERS]
            values.pop(OTHERS, None)
    for key, entry in beside.items():
        if key != OTHERS:
            values[key] = {**entry, "special": True} if isinstance(entry, Mapping) else entry
        elif isinstance(entry, list):
            values[key] = [*(values.get(key) or []), *entry]
    others, late = values.get(OTHERS), None if OTHERS in values else values.get(OTHERS_BEFORE)
    entries = {key: values[key] for key in SPECIAL_TOKENS if values.get(key) is not None}
    entries |= {key: entry for key, entry in values.items() if key.endswith("_token") and _is_token(entry)} | named
    return (
        {key: _token(entry, f"{where}: {key}", special=True) for key, entry in entries.items()},
        _tokens(others, f"{where}: {OTHERS}"),
        _tokens(late, f"{where}: {OTHERS_BEFORE}"),
    )


def _tokens(entries: object, where: str) -> list[AddedToken]:
    if not isinstance(entries or [], list):
        raise DymoeError(f"{where} is neither a list nor an object; {RESTORE}")
    return [_token(entry, f"{where}: an entry", special=True) for entry in cast(list[object], entries or [])]


def _is_token(entry: object) -> bool:
    return isinstance(entry, str) or (isinstance(entry, Mapping) and "content" in entry)


def _declared(
    backend: tokenizers.Tokenizer, directory: Path, config: Mapping[str, Any], special: set[str]
) -> dict[int, AddedToken]:
    """Return id -> token as the files declare them; those of added_tokens.json are special if they are in `special`."""
    entries = config.get(BY_ID)
    if entries is not None:
        where = f"{directory / CONFIG}: {BY_ID}"
        if not isinstance(entries, Mapping) or not all(re.fullmatch("[0-9]{1,10}", key) for key in entries):
            raise DymoeError(f"{where} does not map ids to tokens; {RESTORE}")
        return {int(key): _token(entry, f"{where}: {key}") for key, entry in entries.items()}
    declared = dict[int, AddedToken]()
    for text, token_id in read_object(directory / IDS).items():
        if type(token_id) is not int:
            raise DymoeError(f"{directory / IDS}: token {text!r} has the id {token_id!r}; {RESTORE}")
        if token_id in declared:
            raise DymoeError(
                f"{directory / IDS}: tokens {str(declared[token_id])!r} and {text!r} have one id; {RESTORE}"
            )
        declared[token_id] = AddedToken(text, normalized=text not in special, special=text in special)
    for token_id, token in backend.get_added_tokens_decoder().items():
        if str(declared.get(token_id, token)) == str(token):
            declared[token_id] = token
    return declared


def _token(entry: object, where: str, special: bool = False) -> AddedToken:
    """Return the token of an entry: a text, or an object with its content and how it is found in a text."""
    fields = entry if isinstance(entry, Mapping) else {"content": entry}
    content = fields.get("content")
    flags = {name: fields[name] for name in FLAGS if name in fields}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise DymoeError(f"{where} is neither a text nor an object that describes a token; {RESTORE}")
    return AddedToken(content, **{**flags, "special": special or flags.get("special", False)})


def _as_special(token: AddedToken, names: set[str]) -> AddedToken:
    """Return a token as a special one if its text is in `names`."""
    if token.special or str(token) not in names:
        return token
    return AddedToken(**{**token.__getstate__(), "special": True})


def _add(backend: tokenizers.Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Add those tokens that `backend` does not have as they are; the first of several with one text counts."""
    known = {token.content: token.__getstate__() for token in backend.get_added_tokens_decoder().values()}
    new = dict[str, AddedToken]()
    for token in tokens:
        if known.get(token.content) != token.__getstate__():
            new.setdefault(token.content, token)
    with refusing("the added tokens do not fit", RESTORE):
        check_added(new, json.loads(backend.normalizer.__getstate__()) if new and backend.normalizer else None)
        backend.add_tokens(list(new.values()))


def _check_ids(backend: tokenizers.Tokenizer, declared: Mapping[int, AddedToken], where: Path) -> None:
    for token_id, token in declared.items():
        found = backend.token_to_id(token.content)
        if token.content and found != token_id:
            raise DymoeError(
                f"{where}: token {token.content!r} has the id {token_id}, but {found} by {TOKENIZER}; "
                "use files of one version of the model"
            )


def _states(backend: tokenizers.Tokenizer) -> dict[int, dict[str, Any]]:
    return {token_id: token.__getstate__() for token_id, token in backend.get_added_tokens_decoder().items()}

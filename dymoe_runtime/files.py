"""Small text and JSON files, with errors that name the file and the remedy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dymoe_runtime.errors import DymoeError


def read_text(path: Path, remedy: str) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises DymoeError if the file cannot be read, is not UTF-8, or is blank. `remedy` ends the message unless the
    encoding is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DymoeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DymoeError(f"{path}: {what}; {remedy}") from error
    if not text.strip():
        raise DymoeError(f"{path}: the text is empty; {remedy}")
    return text


def parse_json(text: str | bytes, where: str, remedy: str) -> dict[str, Any]:
    """Return the JSON object in `text`.

    Raises DymoeError if `text` is anything else. Its message starts with `where` and ends with `remedy`.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DymoeError(f"{where}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise DymoeError(f"{where}: not a JSON object; {remedy}")
    return values


def strict(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    """Build dataclass `cls` from `data`.

    Raises DymoeError if a key is unknown or missing. Its message starts with `where` and names the key.
    """
    known = {field.name for field in fields(cls)}
    if unknown := sorted(set(data) - known):
        raise DymoeError(f"{where}: unknown key '{unknown[0]}'; known keys are {', '.join(sorted(known))}")
    try:
        return cls(**data)
    except TypeError as error:
        raise DymoeError(f"{where}: {error}") from error

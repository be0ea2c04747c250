"""Small files of users and models: text and JSON, with errors that name the file and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dymoe_runtime.errors import DymoeError


def read_text(path: Path, remedy: str) -> str:
    """A UTF-8 file that is not blank; DymoeError that ends with `remedy` otherwise."""
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
    """The JSON object in `text`; DymoeError that names `where` and ends with `remedy` if it is none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DymoeError(f"{where}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise DymoeError(f"{where}: not a JSON object; {remedy}")
    return values

"""The files of a Hugging Face tokenizer, read with errors that name the file and the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json
from dymoe_runtime.storage import read_member
from dymoe_runtime.text import tokenizer_check

RESTORE = "copy it from the model's repository or recompile the bundle"
TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"


@contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Raise DymoeError, which begins with `what`, where the library `tokenizers` fails within this context.

    It raises Exception itself, and where it panics an exception that is none. A TypeError is passed on.
    """
    try:
        yield
    except BaseException as error:
        panics = type(error).__name__ == "PanicException"
        if isinstance(error, TypeError) or not (panics or isinstance(error, Exception)):
            raise
        raise DymoeError(f"{what} ({error}); {remedy}") from error


def load_backend(directory: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer in tokenizer.json; raise DymoeError if it is missing or malformed."""
    path = directory / TOKENIZER
    text = _read_text(path)
    with refusing(f"{path}: not a valid tokenizer", RESTORE):
        backend = tokenizers.Tokenizer.from_str(tokenizer_check.checked(text))
    # Training settings that would silently shorten or lengthen a prompt.
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_if_there(path: Path) -> str | None:
    """Return the text of a file, whatever ends its lines in the file, or None if there is none."""
    data = read_member(path, RESTORE)
    try:
        return None if data is None else data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DymoeError(f"{path}: cannot be read ({error}); {RESTORE}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, empty if there is no file; raise DymoeError if it holds anything else."""
    text = read_if_there(path)
    if text is None:
        return {}
    values = parse_json(text, str(path), RESTORE)
    if re.search(r"\\u[dD]", text):
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DymoeError(f"{path}: a text has half of a surrogate pair; {RESTORE}") from error
    return values


def _read_text(path: Path) -> str:
    text = read_if_there(path)
    if text is None:
        raise DymoeError(f"{path}: missing; {RESTORE}")
    return text

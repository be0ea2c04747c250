"""Files that the program reads: opened without surprises, parsed strictly, with errors that name file and remedy."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import stat
import types
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from dymoe_runtime.errors import DymoeError, remedy_of

T = TypeVar("T")
# Digits of the longest number in JSON: more than any float or 128-bit number has.
MAX_DIGITS = 400
# The most bytes of a JSON file: many times those of the largest manifest, and few enough to parse.
MAX_JSON_BYTES = 64 << 20
# The most bytes of a tokenizer or of what comes with it; the largest known has 35 MB.
MAX_MEMBER_BYTES = 128 << 20
# The most bytes of a text.
MAX_TEXT_BYTES = 1 << 30

# Names of files in the same directory.
PLAIN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}$"
# Types of fields that `strict` checks.
FileName = Annotated[str, Meta(pattern=PLAIN_NAME)]
Sha256 = Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]
Bytes = Annotated[int, Meta(ge=0, le=1 << 62)]
Word = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]


def open_regular(path: Path, remedy: str, follow_links: bool = True, flags: int = 0) -> int:
    """Open a regular file to read, with further `flags`; return its descriptor, which the caller closes.

    Raises DymoeError, which ends with `remedy`, if the file cannot be opened, or is not a regular one: a pipe or a
    device could be read without end. Without `follow_links`, a symbolic link is refused, too.
    """
    flags |= os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise DymoeError(f"{path}: {_reason(error, follow_links)}; {remedy_of(error, remedy)}") from error
    except ValueError as error:  # a zero byte in the name
        raise DymoeError(f"{path}: not the name of a file; {remedy}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DymoeError(f"{path}: not a regular file; {remedy}")
    return fd


def read_regular(path: Path, remedy: str, most: int, follow_links: bool = True) -> bytes:
    """Return the bytes of a regular file that has at most `most`; raise DymoeError as `open_regular` does."""
    with open(open_regular(path, remedy, follow_links), "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(most + 1) if size <= most else b""
        except OSError as error:
            raise DymoeError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if max(size, len(data)) > most:
        raise DymoeError(f"{path}: more than {most} bytes, which is too large for such a file; {remedy}")
    return data


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError within this context, of a read, a write or a sync, the name of the file, if it has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path` once all of it is on the disk; an error leaves what was there.

    A link at `path` is followed. With `private` only its owner may read the new file, otherwise whom the umask lets.
    Raises OSError, also if something else than a file is there.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        what = "directory" if target.is_dir() else "device or a pipe"
        raise FileExistsError(errno.EEXIST, f"a {what} is there, not a file", os.fspath(path))
    name = target.parent / f".dymoe-{os.urandom(8).hex()}.partial"
    number = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 if private else 0o666)
    try:
        with naming(path), open(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _flush_folder(target.parent)


def _flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _reason(error: OSError, follow_links: bool) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if error.errno == errno.ELOOP and not follow_links:
        return "a symbolic link, which may lead anywhere"
    return error.strerror or str(error)


def read_text(path: Path, remedy: str) -> str:
    """Return the text of a UTF-8 file that the user names, without a byte order mark. It may be a pipe or a terminal.

    Raises DymoeError if the file cannot be read, is too large or without end, is not UTF-8, or is blank. `remedy` ends
    the message unless the encoding is wrong.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            endless = stat.S_ISCHR(mode) and not file.isatty() and not os.path.samefile(path, os.devnull)
            if stat.S_ISBLK(mode) or endless:
                raise DymoeError(f"{path}: a device, not a text; {remedy}")
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise DymoeError(f"{path}: {_reason(error, True)}; {remedy_of(error, remedy)}") from error
    return decode_text(data, path, remedy)


def decode_text(data: bytes, path: Path, remedy: str) -> str:
    """Return the text of a file with UTF-8 `data`, without a byte order mark, as lines that end in a newline.

    Raises DymoeError if it is too long, is not UTF-8, or is blank; unless the encoding is wrong, the message ends with
    `remedy`.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise DymoeError(f"{path}: more than {MAX_TEXT_BYTES >> 20} MiB, which is too long a text; {remedy}")
    try:
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise DymoeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    if not text.strip():
        raise DymoeError(f"{path}: the text is empty; {remedy}")
    return text


def parse_json(text: str | bytes, where: str, remedy: str) -> dict[str, Any]:
    """Return the JSON object in `text`.

    Raises DymoeError if `text` is anything else, names a key of an object twice, or has a number that is not finite or
    absurdly long. Its message starts with `where` and ends with `remedy`.
    """
    try:
        values = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_not_finite, parse_float=_finite, parse_int=_whole
        )
    except (ValueError, RecursionError) as error:
        raise DymoeError(f"{where}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise DymoeError(f"{where}: not a JSON object; {remedy}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return values


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:40]}... is too large")
    return int(text)


def strict(
    cls: type[T], data: object, where: str, remedy: str, kinds: Mapping[Any, tuple[type, ...]] | None = None
) -> T:
    """Build the dataclass `cls`, and those in its fields, from values of JSON.

    `kinds` maps the type of a field to the dataclasses that it can be; the key `kind` tells them apart, by their class
    variable of that name. Raises DymoeError if a key is unknown or missing, a value does not have the field's type,
    which may be `Annotated` with limits of msgspec, or a class refuses its values by ValueError. Its message starts
    with `where`, names the key, and ends with `remedy`.
    """
    try:
        struct = _struct(cast(Hashable, cls), tuple((kinds or {}).items()))
        built: T = _built(msgspec.convert(data, struct, str_keys=True))
    except (ValueError, RecursionError) as error:  # msgspec's ValidationError is a ValueError
        raise DymoeError(f"{where}: {_explained(str(error))}; {remedy}") from error
    return built


# Messages of msgspec about keys, in the words of this program.
_MESSAGES = (
    (r"^Object contains unknown field `(.*)`", r"unknown key '\1'"),
    (r"^Object missing required field `(.*)`", r"'\1' is missing"),
    (r"^Expected", "expected"),
    (r"`(object|array|int|float|str|bool|null)( \| null)?`", r"\1\2"),
)


def _explained(message: str) -> str:
    """Return a message of msgspec with the key first."""
    what, _, place = message.partition(" - at ")
    for pattern, words in _MESSAGES:
        what = re.sub(pattern, words, what)
    key = place.removeprefix("key in ").strip("`").removeprefix("$").removeprefix(".")
    return f"'{key}': {what}" if key else what


_Kinds = tuple[tuple[Any, tuple[type, ...]], ...]


@cache
def _struct(cls: Any, kinds: _Kinds) -> type[msgspec.Struct]:
    """Return a struct like the dataclass `cls` that refuses unknown keys; `made_from` is that class."""
    hints = get_type_hints(cls, include_extras=True)
    members: list[Any] = []
    for field in fields(cls):
        member: tuple[Any, ...] = (field.name, _with_structs(hints[field.name], kinds))
        if field.default is not MISSING:
            member = (*member, field.default)
        elif field.default_factory is not MISSING:
            member = (*member, msgspec.field(default_factory=field.default_factory))
        members.append(member)
    tags = {"tag_field": "kind", "tag": cls.kind} if any(cls in classes for _, classes in kinds) else {}
    namespace = {"made_from": cls}
    return msgspec.defstruct(
        cls.__name__, members, namespace=namespace, forbid_unknown_fields=True, kw_only=True, **tags
    )


def _with_structs(hint: Any, kinds: _Kinds) -> Any:
    """Return a type with structs in place of dataclasses."""
    for known, classes in kinds:
        if hint == known:
            return Union[tuple(_struct(cls, kinds) for cls in classes)]  # noqa: UP007  # of types known only here
    if is_dataclass(hint):
        return _struct(cast(Hashable, hint), kinds)
    origin = get_origin(hint)
    if origin is None or origin is Annotated:
        return hint
    inner = tuple(part if part is Ellipsis else _with_structs(part, kinds) for part in get_args(hint))
    return Union[inner] if origin in (Union, types.UnionType) else origin[inner]  # noqa: UP007


def _built(value: Any) -> Any:
    """Return `value` with dataclasses in place of structs."""
    if isinstance(value, msgspec.Struct):
        return value.made_from(**{name: _built(getattr(value, name)) for name in value.__struct_fields__})  # type: ignore[attr-defined]
    if isinstance(value, tuple) and value and isinstance(value[0], msgspec.Struct):
        return tuple(map(_built, value))
    if isinstance(value, dict):
        return {key: _built(item) for key, item in value.items()}
    return value

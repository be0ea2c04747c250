"""Seeded mutations of files: of their bytes, of JSON in them, of headers of tensors, and of what a name stands for."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fuzz import hostile

# What stands in place of a value: another type, a number at some limit, or a text that is none.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 4096, 1 << 16, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 32),
    *(1 << 53, 1 << 62, 1 << 63, (1 << 63) - 1, -(1 << 63), 1 << 64, 10**40, 10**300, 10**400),
    *(0.0, -0.0, 0.5, 1e-320, 1e38, 1e39, 1e308, -1e308, float("inf"), float("nan"), 2.5, -1.5),
    *("", " ", "x", "0", "-1", "1e5", "none", "null", "../../etc/passwd", "/etc/passwd", "/dev/zero", ".", "\x00"),
    *("\x1b[31m", "\u202e", "\ud800", "é", "x" * 300, "x" * 100_000, "{{ x }}", "clamped_swiglu:nan:0", "yarn"),
    *([], {}, [[]], [None], ["x"], [0] * 1000, {"x": {}}, {"": None}, [[[[[[[[0]]]]]]]], [1, 2, 3], [4, 2], [2, 9]),
)
DEEP = 100_000


def mutate_file(path: Path, rng: random.Random) -> str:
    """Change a file in some way; return what was done."""
    data = path.read_bytes()
    kinds: list[Callable[[bytes, random.Random], bytes]] = [mutate_bytes]
    if path.suffix in (".json", ".jsonl"):
        kinds = [mutate_json] * 6 + [mutate_text, mutate_bytes]
    elif path.suffix == ".safetensors":
        kinds = [mutate_header] * 3 + [swap_entries, mutate_numbers] + [mutate_bytes] * 2
    elif path.suffix in (".toml", ".jinja"):
        kinds = [mutate_text, mutate_bytes]
    if path.name == "tokenizer.json":
        kinds += [mutate_tokenizer] * 8
    if path.name in ("tokenizer_config.json", "chat_template.jinja"):
        kinds += [mutate_template] * 3
    if rng.random() < 0.04:
        return replace_kind(path, rng)
    kind = rng.choice(kinds)
    changed = kind(data, rng)
    path.unlink()  # it may be a link to the sound file
    path.write_bytes(changed)
    return f"{path.name}: {kind.__name__}"


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, insert, delete, repeat, overwrite or cut some bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        at = rng.randrange(len(changed) + 1) if rng.random() < 0.7 else rng.randrange(min(len(changed), 64) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 100, 5000))
        what = rng.randrange(7)
        if what == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 1 and at < len(changed):
            changed[at] = rng.choice((0, 255, rng.randrange(256)))
        elif what == 2:
            changed[at:at] = rng.randbytes(size)
        elif what == 3:
            del changed[at : at + size]
        elif what == 4:
            changed[at:at] = changed[at : at + size]
        elif what == 5:
            changed[at : at + size] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * size
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Put a token of JSON, TOML or a template somewhere, or swap two parts of the text."""
    tokens = (
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        "'",
        "null",
        "1e999",
        "NaN",
        "-",
        "\n",
        "=",
        "{{",
        "}}",
        "{%",
        "\\u",
        "//",
    )
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    what = rng.randrange(4)
    if what == 0:
        return data[:at] + rng.choice(tokens).encode() + data[at:]
    if what == 1:
        return data[:at] + data[to:]
    if what == 2:
        return data[:to] + data[at:to] + data[to:]
    return data[:at] + rng.choice((b"[", b'{"a":')) * DEEP + data[at:]


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change some values or keys of JSON, and sometimes name a key twice."""
    try:
        values = json.loads(data)
    except ValueError:
        return mutate_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        change_value(values, rng)
    text = json.dumps(values)
    if rng.random() < 0.05 and isinstance(values, dict) and values:
        key = rng.choice(list(values))
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(VALUES))}" + "}"
    return text.encode()


def change_value(values: Any, rng: random.Random) -> None:
    """Change one value or key in a tree of JSON, in place; deep ones as likely as shallow ones."""
    place, key = values, None
    while isinstance(place, (dict, list)) and place:
        holder, key = place, rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = holder[key]
        if rng.random() < 0.25:
            break
    if key is None:
        return
    what = rng.randrange(10)
    if what < 6:
        holder[key] = rng.choice(VALUES)
    elif what == 6:
        del holder[key]
    elif what == 7 and isinstance(place, (int, float)) and not isinstance(place, bool):
        real = float(place) if abs(place) < 1 << 1000 else 0.5
        holder[key] = rng.choice((place + 1, place - 1, place * 2, -place, place * 1000, real, str(place)))
    elif what == 8 and isinstance(holder, dict):
        holder[rng.choice(("zzz", "", f"{key}2", "0", "\x1b", "../x"))] = holder[key]
    elif isinstance(holder, list):
        holder.insert(key, rng.choice((place, *VALUES)))
    else:
        other = rng.choice(list(holder))
        holder[key], holder[other] = holder[other], holder[key]


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file, or its length."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.15:
        claimed = rng.choice((0, 1, 2, length - 1, length + 1, 1 << 31, 1 << 62, (1 << 64) - 1, len(data)))
        return claimed.to_bytes(8, "little") + header + rest
    changed = mutate_json(header, rng)
    if rng.random() < 0.5:  # so that the data stay where they were, if there is room
        changed = changed.ljust(length)
    return len(changed).to_bytes(8, "little") + changed + rest


def swap_entries(data: bytes, rng: random.Random) -> bytes:
    """Give a tensor of a safetensors file the type, shape, place or name of another one, or move where it begins."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    key = rng.choice(("dtype", "shape", "data_offsets", "name", "move"))
    if key == "name":
        header[one], header[other] = header[other], header[one]
    elif key == "move":
        by = rng.choice((-8, -4, -1, 1, 4, 8, 64, 4096))
        header[one]["data_offsets"] = [offset + by for offset in header[one]["data_offsets"]]
    else:
        header[one][key] = header[other][key]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def mutate_numbers(data: bytes, rng: random.Random) -> bytes:
    """Put numbers that are not finite, huge, tiny or random in place of some weights, aligned as these are."""
    start = 8 + int.from_bytes(data[:8], "little")
    count = rng.choice((1, 2, 64, 4096))
    at = start + rng.randrange(max(1, (len(data) - start) // 4)) * 4
    patterns = (0x7FC00000, 0x7F800000, 0xFF7FFFFF, 0x00000001, 0x7FC07FC0, 0x7F807F80, 0xFFFFFFFF, 0x80000000)
    numbers = rng.choice(patterns).to_bytes(4, "little") * count
    changed = rng.choice((numbers, rng.randbytes(4 * count)))[: len(data) - at]
    return data[:at] + changed + data[at + len(changed) :]


def mutate_tokenizer(data: bytes, rng: random.Random) -> bytes:
    """Change a part of a tokenizer to a hostile one."""
    try:
        values = json.loads(data)
        values |= rng.choice([*hostile.TOKENIZERS.values(), *hostile.ODD.values()])
    except (ValueError, TypeError):
        return mutate_bytes(data, rng)
    if rng.random() < 0.3:
        change_value({name: value for name, value in values.items() if name != "model"}, rng)
    return json.dumps(values).encode()


def mutate_template(data: bytes, rng: random.Random) -> bytes:
    """Put a hostile chat template in place of the one that is there."""
    template = rng.choice(hostile.TEMPLATES)
    try:
        return json.dumps({**json.loads(data), "chat_template": template}).encode()
    except (ValueError, TypeError):
        return template.encode()


def replace_kind(path: Path, rng: random.Random) -> str:
    """Put something in place of a file that is no such file."""
    what = rng.choice(("missing", "empty", "fifo", "directory", "link", "loop", "device", "unreadable size"))
    path.unlink()
    if what == "empty":
        path.write_bytes(b"")
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what in ("link", "device"):
        path.symlink_to("/etc/passwd" if what == "link" else "/dev/zero")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "unreadable size":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    return f"{path.name}: {what}"


def make_session_right(path: Path, rng: random.Random) -> None:
    """Change the header or the data of a saved session, as far as it is one, and make digest and checksums right."""
    try:
        data = content_of(path)
        begin = 48 + int.from_bytes(data[12:16], "little")
        header = json.loads(data[48:begin])
        sections = [header["ids"], header["note"], *header["layers"]]
        ends = list(itertools.accumulate((section["nbytes"] for section in sections), initial=begin))
        parts = [data[at:end] for at, end in itertools.pairwise(ends)]
        if rng.random() < 0.5:
            number = rng.randrange(len(parts))
            change = mutate_json if number == 1 and rng.random() < 0.8 else mutate_bytes
            parts[number] = change(parts[number], rng)
            for section, part in zip(sections, parts, strict=True):
                section |= {"nbytes": len(part), "crc32": zlib.crc32(part)}
        else:
            change_value(header, rng)
    except (ValueError, OSError, TypeError, KeyError):
        return
    text = json.dumps(header).encode()
    start = data[:12] + len(text).to_bytes(4, "little") + hashlib.sha256(text).digest()
    path.write_bytes(b"".join((start, text, *parts)))


def content_of(path: Path) -> bytes:
    """Return the bytes of a file; raise ValueError if a mutation has made it something else, or endless."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 26:
        raise ValueError(f"{path} is no file of a bundle any more")
    return path.read_bytes()


def make_digests_right(bundle: Path, spans: Sequence[int] | None) -> bool:
    """Make the sizes and digests in a manifest right again; with the sizes of segments, checksums of weights, too.

    Returns False if the manifest is not one that can be made right.
    """
    path = bundle / "manifest.json"
    try:
        manifest = json.loads(content_of(path))
        manifest.pop("sha256", None)
        for name, entry in manifest["files"].items():
            file = bundle / name
            if "/" in name or not file.is_file() or file.is_symlink() or file.stat().st_size > 1 << 24:
                continue
            entry["nbytes"] = file.stat().st_size
            if entry.get("sha256"):
                entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        if spans is not None:
            make_checksums_right(bundle, manifest, spans)
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        path.unlink()
        path.write_text(json.dumps(manifest, indent=1, sort_keys=True))
    except (ValueError, TypeError, AttributeError, KeyError, OSError, RecursionError):
        return False
    return True


def make_checksums_right(bundle: Path, manifest: dict[str, Any], spans: Sequence[int]) -> None:
    """Set the CRC-32 of dense tensors and of segments, as far as files and manifest are as they should be."""
    data = content_of(bundle / "dense.safetensors")
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name in manifest["dense_crc32"]:
            begin, end = entry["data_offsets"]
            manifest["dense_crc32"][name] = zlib.crc32(data[8 + length + begin : 8 + length + end])
    for layer in manifest["layers"].values():
        records = content_of(bundle / layer["file"])[layer["data_start"] :]
        for expert, row in enumerate(layer["crc32"]):
            at = expert * sum(spans)
            for segment, span in enumerate(spans[: len(row)]):
                row[segment] = zlib.crc32(records[at : at + span])
                at += span

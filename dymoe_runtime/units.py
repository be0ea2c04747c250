"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as '4GiB', '500 MB' or '123'.

    Raises ValueError for anything else.

    >>> parse_size("1.5GiB"), parse_size("500 MB")
    (1610612736, 500000000)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError(f"'{text}' is not a size; write it like 4GiB, 500MB or a number of bytes")
    nbytes = float(match[1]) * UNITS[match[2].lower()]
    if nbytes >= 1 << 63:
        raise ValueError(f"'{text[:20]}{'…' * (len(text) > 20)}' is more than there can be")
    return int(nbytes)


def format_size(nbytes: float) -> str:
    """Return a size as people write it, with one digit.

    >>> format_size(1234567)
    '1.2 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError

"""Numbers as text, one format for each quantity."""

from __future__ import annotations

# Values from MOST up count as missing, like NaN.
MOST = 1e100
MISSING = "–"


def finite(value: object) -> float | None:
    """Return `value` as a float, or None if it is not a number that can be shown."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < MOST else None


def number(value: object, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits, or a dash if it cannot be shown; an int keeps all digits.

    >>> number(1234.5), number(0.000123456), number(32768)
    ('1,230', '0.000123', '32,768')
    """
    shown = finite(value)
    if shown is None:
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if shown != 0 and not 1e-6 <= abs(shown) < 1e12:
        return f"{shown:.{digits}g}"
    rounded = float(f"{shown:.{digits}g}")
    plain = f"{rounded:,.12f}".rstrip("0").rstrip(".")
    return "0" if plain == "-0" else plain


def fixed(value: object, decimals: int) -> str:
    """Return `value` with so many decimals, or a dash if it cannot be shown."""
    shown = finite(value)
    return MISSING if shown is None else f"{shown:,.{decimals}f}"


def percent(value: object, decimals: int = 1) -> str:
    """Return a share in percent, or a dash if it cannot be shown.

    >>> percent(0.9587)
    '95.9%'
    """
    shown = finite(value)
    return MISSING if shown is None else f"{fixed(100 * shown, decimals)}%"


def kl(value: object) -> str:
    """Return a KL with four decimals, a small one with two significant digits, or a dash if it cannot be shown.

    >>> kl(0.05845), kl(0.000123456)
    ('0.0585', '0.00012')
    """
    shown = finite(value)
    return fixed(value, 4) if shown is None or abs(shown) >= 0.001 else number(shown, 2)


def size(nbytes: object) -> str:
    r"""Return a number of bytes with three significant digits, which does not break, or a dash if it cannot be shown.

    >>> size(1277952), size(16.1 * 2**30), size(999.6 * 2**20)
    ('1.22\xa0MiB', '16.1\xa0GiB', '0.976\xa0GiB')
    """
    left = finite(nbytes)
    if left is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(left) < 999.5 or unit == "GiB":
            return f"{three(left)}\xa0{unit}" if unit != "B" else f"{left:.0f}\xa0B"
        left /= 1024
    raise AssertionError


def three(value: float) -> str:
    """Return `value` with three significant digits, trailing zeros included.

    >>> three(0.8), three(12.34), three(12345)
    ('0.800', '12.3', '12,345')
    """
    decimals = next((d for d, below in ((3, 0.9995), (2, 9.995), (1, 99.95)) if abs(value) < below), 0)
    return f"{value:,.{decimals}f}"

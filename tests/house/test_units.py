"""Sizes as people write them."""

from __future__ import annotations

import pytest

from dymoe_runtime.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("123", 123),
        ("123B", 123),
        ("4k", 4000),
        ("4KB", 4000),
        ("4KiB", 4096),
        ("4ki", 4096),
        ("500MB", 500_000_000),
        ("500 MB", 500_000_000),
        (" 2 GiB ", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("0.5kib", 512),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 << 40),
        ("16gb", 16 * 10**9),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


def test_a_size_beyond_all_numbers_is_refused() -> None:
    for text in ("9" * 400, "9" * 5000 + "GiB", "9999999999TiB"):
        with pytest.raises(ValueError, match="more than there can be"):
            parse_size(text)


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "-1GiB", "4PB", "4iB", "4i", "1,5GiB", "4GiB/s", "1e9", "4 G i B", "4GiBs", ".5G", "٤GiB"]
)
def test_what_is_not_a_size_is_refused_with_what_was_given(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert f"'{text}'" in str(caught.value)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1234567, "1.2 MiB"),
        (5 << 30, "5.0 GiB"),
        (3 << 40, "3072.0 GiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_are_written_with_one_digit(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.parametrize("nbytes", [0, 5, 4096, 3 << 20, 7 << 30])
def test_written_sizes_can_be_read(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == nbytes

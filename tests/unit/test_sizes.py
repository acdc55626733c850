"""Sizes as people write them."""

from __future__ import annotations

import pytest

from kvstore.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("0.1GB", 100_000_000),
        (" 2 TiB ", 2 << 40),
        ("64kib", 64 << 10),
        ("4096", 4096),
        ("0", 0),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "8 G iB", "٣GiB", "1,5GB", "inf", "0x10"])
def test_what_is_no_size_says_what_is(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write for example 8GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["8G", "8Gi", "8gigs"])
def test_an_ambiguous_unit_is_refused_with_the_choices(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown unit .* KiB, MiB, GiB"):
        parse_size(text)


def test_a_size_beyond_any_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="is more than"):
        parse_size("99999999TiB")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (100, "100B"),
        (4096, "4KiB"),
        (8 << 30, "8GiB"),
        (int(5.8 * (1 << 30)), "5.8GiB"),
        (3 << 50, "3072TiB"),
    ],
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert format_size(size) == text

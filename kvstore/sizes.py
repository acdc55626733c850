"""Sizes as people write them: 8GiB, 512MiB, 1.5GB."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MIB = 1 << 20
GIB = 1 << 30

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)
_BYTES_MAX = 1 << 60
_PERMILLE_MAX = 950


@dataclass(frozen=True, slots=True)
class Share:
    """A part of what is free where it is to be, in thousandths."""

    permille: int


def parse_size(text: str) -> int:
    """Bytes of "8GiB" (1024 based), "1.5GB" (1000 based) or a plain number.

    Raises:
        ValueError: not a size; the message says what is.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not a size; write for example 8GiB, 512MiB, 1.5GB or a number of bytes")
    number, unit = found.groups()
    scale = _UNITS.get(unit.lower())
    if scale is None:
        raise ValueError(
            f"{text!r} has the unknown unit {unit!r}; write KiB, MiB, GiB, TiB (powers of 1024) "
            "or KB, MB, GB, TB (powers of 1000)"
        )
    size = int(Fraction(number) * scale)
    if size > _BYTES_MAX:
        raise ValueError(f"{text!r} is more than {format_size(_BYTES_MAX)}")
    return size


def parse_share(text: str) -> Share:
    """The share that "50%" or "12.5%" is.

    Raises:
        ValueError: not a share from 0.1% to 95%; the rest is the device's other users'.
    """
    number = text.strip().removesuffix("%").strip()
    share = Fraction(number) * 10 if re.fullmatch(r"\d+(\.\d+)?", number, re.ASCII) else Fraction(0)
    if not 1 <= share <= _PERMILLE_MAX:
        raise ValueError(f"{text!r} is not a share from 0.1% to {_PERMILLE_MAX // 10}%; write for example 50%")
    return Share(int(share))


def format_size(size: int) -> str:
    """A size for people: exact where it is a whole number of units ("8GiB"), else with one decimal ("5.8GiB")."""
    value, units = float(size), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if value < 1024 or unit == units[-1]:
            return f"{value:.0f}{unit}" if value == int(value) else f"{value:.1f}{unit}"
        value /= 1024
    raise AssertionError("unreachable: the last unit always returns")

"""One object for each small number. Beyond 256 Python makes a new one, of 32 bytes, wherever a number is computed."""

from __future__ import annotations

_NUMBERS: list[int] = []


def numbers(count: int) -> list[int]:
    """[0, 1, ...], at least `count` of them, the same objects each time. It grows, and must not be changed."""
    if count > len(_NUMBERS):
        _NUMBERS.extend(range(len(_NUMBERS), count + count // 8))
    return _NUMBERS

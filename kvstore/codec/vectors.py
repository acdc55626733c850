"""The inner loops of exphuf in numpy: the same bytes as loops.py, where numba is not installed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.codec.loops import BIASED, MANTISSA_BITS, SPREAD, U8, U16, Form, Rows

_UP: Final = np.arange(7, 0, -1).reshape(7, 1)  # from the bit that a plane takes to the eighth of its byte


def survey(values: U16, shift: int, codes: U8) -> None:
    """See loops.surveyor."""
    tokens, inner = values.shape[1:]
    parts = values & np.uint16(0x7FFF)
    parts >>= np.uint16(MANTISSA_BITS[shift])
    away = _sums(parts)
    away -= away.sum(axis=1, keepdims=True, dtype=np.int32) // inner
    away *= 2
    np.right_shift(values, np.uint16(15), out=parts)
    excess = 2 * _sums(parts) - tokens
    sure = np.where(_squares(excess) > BIASED * tokens * inner, 0, math.isqrt(16 * tokens)).astype(np.int32)
    margin = np.where(_squares(away) > SPREAD * tokens * inner, 2, 6) * math.isqrt(tokens) + tokens
    margin = margin.astype(np.int32)
    np.add((away > margin).view(np.uint8), np.uint8(1), out=codes)
    codes -= (away < -margin).view(np.uint8)
    codes <<= np.uint8(1)
    codes |= (excess > sure).view(np.uint8)


def _sums(parts: U16) -> NDArray[np.int32]:
    """Sums over tokens, of (groups, tokens, inner): below 2^14, as no more than 64 tokens are surveyed."""
    sums: U16 = np.add.reduce(parts, axis=1, dtype=np.uint16)
    return sums.astype(np.int32)


def _squares(values: NDArray[np.int32]) -> NDArray[np.int64]:
    """The sum of the squares in each row; a square is below 2^31."""
    sums: NDArray[np.int64] = np.square(values).sum(axis=1, keepdims=True, dtype=np.int64)
    return sums


def subtract(values: U16, rows: Rows, out: U16) -> None:
    """Out = values - the offsets in `rows`, modulo 2^16; `out` may be `values`."""
    if out is not values:
        np.copyto(out, values)
    if rows.offsets.any():
        for part, row in _rows(out, rows):
            np.subtract(part, row, out=part)


def split_values(values: U16, rows: Rows, shift: int, left: U16) -> tuple[int, int]:
    """See loops.split_values."""
    subtract(values, rows, left)
    unsigned = left << np.uint16(1)
    return int(unsigned.min()) >> (shift + 1), int(unsigned.max()) >> (shift + 1)


def pack_values(left: U16, form: Form, symbols: U8, rest: U8) -> None:
    """See loops.packer."""
    base, shift = form
    wide = left >> np.uint16(shift - 1)
    wide &= np.uint16((1 << (16 - shift)) - 2)
    wide -= np.uint16(2 * base)
    wide += left >> np.uint16(15)
    np.copyto(symbols, wide, casting="unsafe")
    np.right_shift(left, np.uint16(16 - shift), out=wide)
    wide &= np.uint16(1 << (shift - 1))
    left ^= wide
    left &= np.uint16((1 << shift) - 1)
    np.copyto(rest, left[: rest.size], casting="unsafe")
    tail = left[rest.size :].astype(np.uint8)
    if tail.size:
        word, eighth = _word(tail.size)
        planes = rest[: 7 * tail.size].view(word).reshape(7, -1)
        planes |= (tail.view(word) << _UP.astype(word)) & eighth


def join_values(symbols: U8, rest: U8, rows: Rows, form: Form, out: U16) -> None:
    """See loops.join_values. Every pass stays in the second-level cache."""
    base, shift = form
    np.multiply(symbols, np.uint16((1 << 15) + (1 << (shift - 1))), out=out)
    spare = out.size - rest.size
    if spare:
        word, eighth = _word(spare)
        planes = rest[: 7 * spare].copy().view(word).reshape(7, -1)
        planes &= eighth
        tail = planes[0] >> word(1)
        for plane in planes[1:]:
            tail |= plane
            tail >>= word(1)
        out[rest.size :] ^= tail.view(np.uint8)
        rest = rest & np.uint8(0x7F)
    target = out[: rest.size]
    np.bitwise_xor(target, rest, out=target)
    first = np.uint16(base << shift & 0xFFFF)
    if rows.offsets.any():
        for part, row in _rows(out, Rows(rows.offsets + first, rows.tokens)):
            np.add(part, row, out=part)
    elif first:
        np.add(out, first, out=out)


def pack_fields(left: U16, symbols: U8, rest: U8) -> None:
    """See loops.pack_fields."""
    np.right_shift(left, np.uint16(7), out=symbols, casting="unsafe")
    np.copyto(rest, (left & np.uint16(0x7F)) | (left >> np.uint16(8) & np.uint16(0x80)), casting="unsafe")


def join_fields(symbols: U8, rest: U8, rows: Rows, out: U16) -> None:
    """See loops.join_fields."""
    np.left_shift(symbols, np.uint16(7), out=out)
    out |= rest & np.uint16(0x7F)
    out |= (rest & np.uint16(0x80)) << np.uint16(8)
    if rows.offsets.any():
        for part, row in _rows(out, rows):
            np.add(part, row, out=part)


def offsets_of(codes: U8, mantissa_bits: int, offsets: U16) -> None:
    """See loops.offsets_of."""
    np.right_shift(codes, 1, out=offsets)
    offsets -= np.uint16(1)
    offsets <<= np.uint16(mantissa_bits)
    offsets += codes.astype(np.uint16) << np.uint16(15)


def _word(nbytes: int) -> tuple[Any, Any]:
    """The type to take so many bytes by, eight at a time where that goes, and the eighth bit of every byte in it."""
    word = np.uint8 if nbytes % 8 else np.uint64
    return word, word(0x8080808080808080 & np.iinfo(word).max)


def _rows(values: U16, rows: Rows) -> Iterator[tuple[U16, U16]]:
    """`values` in pieces with the offsets that broadcast over them: all whole groups in one, then what is left."""
    offsets, tokens = rows
    inner = offsets.shape[1]
    span = inner * min(tokens, -(-values.size // inner))  # a tile may lie within one group
    groups = values.size // span
    yield values[: groups * span].reshape(groups, -1, inner), offsets[:groups, None, :]
    left = values[groups * span :]
    whole = left.size // inner
    if whole:
        yield left[: whole * inner].reshape(whole, inner), offsets[groups]
    if left.size % inner:
        yield left[whole * inner :], offsets[groups, : left.size % inner]

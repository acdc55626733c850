"""The inner loops of exphuf in numpy: the same bytes as loops.py, where numba is not installed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from kvstore.codec.loops import BIASED, MANTISSA_BITS, SPREAD, U8, U16, Form, Rows


def survey(values: U16, shift: int, codes: U8) -> None:
    """See loops.surveyor."""
    tokens, inner = values.shape[1:]
    exponents = (values & np.uint16(0x7FFF)) >> np.uint16(MANTISSA_BITS[shift])
    away = np.add.reduce(exponents, axis=1, dtype=np.uint16).astype(np.int64)
    away = 2 * (away - away.sum(axis=1, keepdims=True) // inner)
    excess = 2 * np.add.reduce(values >> np.uint16(15), axis=1, dtype=np.uint16).astype(np.int64) - tokens
    square = excess * excess
    sure = np.where(square.sum(axis=1, keepdims=True) > BIASED * tokens * inner, 0, 16 * tokens)
    spread = (away * away).sum(axis=1, keepdims=True) > SPREAD * tokens * inner
    margin = tokens + np.where(spread, 2, 6) * math.isqrt(tokens)
    codes[:] = 2 * (1 + (away > margin).astype(np.int64) - (away < -margin)) + ((excess > 0) & (square > sure))


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
    for plane in range(7 if tail.size else 0):
        rest[plane * tail.size : (plane + 1) * tail.size] |= (tail >> np.uint8(plane)) << np.uint8(7)


def join_values(symbols: U8, rest: U8, rows: Rows, form: Form, out: U16) -> None:
    """See loops.join_values. Every pass stays in the second-level cache."""
    base, shift = form
    np.multiply(symbols, np.uint16((1 << 15) + (1 << (shift - 1))), out=out)
    spare = out.size - rest.size
    if spare:
        tail = rest[:spare] >> np.uint8(7)
        for plane in range(1, 7):
            bits = rest[plane * spare : (plane + 1) * spare] >> np.uint8(7 - plane)
            bits &= np.uint8(1 << plane)
            tail |= bits
        out[rest.size :] ^= tail
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
